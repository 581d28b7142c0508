"""What `bench kernels` times of LaCT's fast weights."""

from collections.abc import Callable
from typing import Any

import torch

from megatron_refine.kernels.lact import Rule, Tokens, chunk_lact, stacked
from megatron_refine.kernels.lact.reference import recurrent_lact
from megatron_refine.platform import hardware


def ways(cost: Any, length: int) -> dict[str, Callable[[], Any]]:
    """Return the ways to compute `length` tokens of a layer of this cost's model."""
    m: Any = cost.model
    heads, width, inner, device = m.num_lact_heads, m.head_dim, m.inner_dim, hardware.device()
    shape = 1, length, heads
    q, k, v = (torch.randn(*shape, width, device=device, requires_grad=True) for _ in range(3))
    rates, momentum = 1e-3 * torch.rand(*shape, 3, device=device), torch.rand(shape, device=device)
    w0, w1, w2 = (torch.randn(heads, *size, device=device, requires_grad=True) * width**-0.5
                  for size in ((inner, width), (width, inner), (inner, width)))  # fmt: skip
    initial = w0.detach().requires_grad_(), w1.detach().requires_grad_(), w2.detach().requires_grad_()
    rule = Rule(m.lact_chunk_size, m.use_muon, m.ttt_prenorm)
    return {
        "chunks": lambda: chunk_lact(stacked(*initial), q, Tokens.of(k, v, rates, momentum), rule)[0],
        "recurrence": lambda: recurrent_lact(initial, q[0], k[0], v[0], rates[0], momentum[0], rule),
    }
