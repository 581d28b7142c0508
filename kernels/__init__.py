"""The sequence-mixing ops. Imported as `megatron_refine.kernels` only: a bare `import kernels` would make a second copy."""

if __name__ != "megatron_refine.kernels":
    raise ImportError("import megatron_refine.kernels, not kernels")
