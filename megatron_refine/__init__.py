"""REFINE training of fast-weight language models on Megatron-Core."""

__version__ = "0.2.0"
