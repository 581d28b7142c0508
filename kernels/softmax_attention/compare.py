"""What `bench kernels` times of softmax attention."""

from collections.abc import Callable
from typing import Any

import torch

from megatron_refine.kernels.softmax_attention import causal_attention, in_turns
from megatron_refine.platform import hardware


def ways(cost: Any, length: int) -> dict[str, Callable[[], Any]]:
    """Return the ways to compute `length` tokens of a layer of this cost's heads."""
    c = cost.layer
    shape: dict[str, Any] = {"device": hardware.device(), "requires_grad": True}
    q = torch.randn(1, length, c.heads, c.head_dim, **shape)
    k, v = (torch.randn(1, length, c.kv_heads, c.head_dim, **shape) for _ in range(2))
    return {"groups": lambda: causal_attention(q, k, v), "heads in turns": lambda: in_turns(q, k, v)}
