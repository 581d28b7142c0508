"""LaCT's fast weights: chunks of matrix products, in torch on any device (a chunk is thousands of tokens)."""

from collections.abc import Sequence
from typing import Any

from megatron_refine.kernels import window_attention
from megatron_refine.kernels.lact.chunk import Tokens, Weights, after, chunk_lact, join, read, stacked, start
from megatron_refine.kernels.lact.passes import row_lengths
from megatron_refine.kernels.lact.update import Rule, ascent, ended

__all__ = [
    "Rule", "Tokens", "Weights", "after", "ascent", "chunk_lact", "ended", "join", "read", "row_lengths", "stacked",
    "start", "used",
]  # fmt: skip


def used(costs: Sequence[Any], gpu: bool) -> str:
    """Say what computes the attention beside it on this machine."""
    return window_attention.used(gpu)
