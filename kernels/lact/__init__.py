"""LaCT's fast weights: chunks of matrix products, in torch on any device (a chunk is thousands of tokens)."""

from megatron_refine.kernels.lact.chunk import Tokens, Weights, after, chunk_lact, join, read, stacked, start
from megatron_refine.kernels.lact.update import Rule

__all__ = ["Rule", "Tokens", "Weights", "after", "chunk_lact", "join", "read", "stacked", "start"]
