"""LaCT's fast weights: chunks of matrix products, in torch on any device (a chunk is thousands of tokens)."""

from megatron_refine.kernels.lact.chunk import Fast, Rule, Tokens, Weights, after, chunk_lact, join, read, start

__all__ = ["Fast", "Rule", "Tokens", "Weights", "after", "chunk_lact", "join", "read", "start"]
