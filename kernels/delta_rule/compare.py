"""What `bench kernels` times of the delta rule."""

from collections.abc import Callable
from typing import Any

import torch

from megatron_refine.kernels.delta_rule import delta_rule, l2_normalize
from megatron_refine.kernels.delta_rule.reference import recurrent_delta_rule
from megatron_refine.platform import hardware


def ways(cost: Any, length: int) -> dict[str, Callable[[], Any]]:
    """Return the ways to compute `length` tokens of a layer with this cost's heads and widths."""
    shape, device = (1, length, cost.heads), hardware.device()
    q, k = (l2_normalize(torch.randn(*shape, cost.key_dim, device=device)).requires_grad_() for _ in range(2))
    v = torch.randn(*shape, cost.value_dim, device=device, requires_grad=True)
    beta = torch.rand(shape, device=device, requires_grad=True)
    g = -torch.rand(shape, device=device) if cost.gated_rule else None
    return {
        "chunks": lambda: delta_rule(q, k, v, beta, g)[0],
        "recurrence": lambda: recurrent_delta_rule(q, k, v, beta, g)[0],
    }
