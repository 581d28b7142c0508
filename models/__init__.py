"""The model families. Imported as `megatron_refine.models` only: a bare `import models` would make a second copy."""

if __name__ != "megatron_refine.models":
    raise ImportError("import megatron_refine.models, not models")
