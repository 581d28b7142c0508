"""The sequence-mixing ops. Imported as `megatron_refine.kernels` only: bare `kernels` would be a second copy.

transformers, and so flash-linear-attention, looks for a package `kernels` of that name by importing it, and finds this
folder where the repository is on the path: it must learn that it is too old to be used, and not fail.
"""

if __name__ != "megatron_refine.kernels":
    __version__, __path__ = "0", []  # nothing inside can be imported from here
