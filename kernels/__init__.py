"""The sequence-mixing ops. Imported as `megatron_refine.kernels` only: bare `kernels` would be a second copy."""

if __name__ != "megatron_refine.kernels":
    raise ImportError("import megatron_refine.kernels, not kernels")
