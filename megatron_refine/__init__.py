"""REFINE training of fast-weight language models on Megatron-Core."""

__version__ = "0.1.0"
