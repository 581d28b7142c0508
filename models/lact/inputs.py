"""What LaCT's mixer makes of projected rows, and of what was read for them: one pass over memory each.

The facts are in mixer.py.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_refine.kernels.fused import fused
from megatron_refine.kernels.lact import Tokens
from megatron_refine.models.common.rope import Table, rope
from megatron_refine.models.lact.config import LactConfig

IDENTITY = 0.5  # of the initial W0 and W2 beside their low-rank part
UNIT_EPS, READ_EPS = 1e-5, 1e-5  # whatever norm_eps is
BASE_RATE = 0.001
BASE_RATE_INVERSE = BASE_RATE + math.log(-math.expm1(-BASE_RATE))  # softplus^-1


@dataclass(frozen=True)
class Inputs:
    """Of rows [N, m]: queries, keys and values of the attention, queries and tokens of the fast weights, scale."""

    q: Tensor  # [N, m, h, d]
    k: Tensor
    v: Tensor
    fast_q: Tensor  # [N, m, H, D]; in memory [N, H, m, D], as the products take it
    tokens: Tokens
    scale: Tensor | None  # [N, m, H]

    @classmethod
    def of(cls, rows: Tensor, bias: Tensor, moves: tuple[Tensor, Tensor], turn: Table, shape: "Shape") -> "Inputs":
        """Projected rows [N, m, H, *], bias [H, *] of the last columns, scale and offset [H, D, 2] of queries and keys,
        and a table of the rows' positions."""
        q, k, v, fast_q, x, rates, momentum, scale = _prepared(rows, bias, *moves, *turn, shape)
        return cls(q, k, v, fast_q.transpose(1, 2), Tokens(x, rates, momentum), scale)


class Shape(NamedTuple):
    """What `Inputs.of` needs of the model."""

    dim: int  # D, of a fast-weight head
    attention_dim: int  # d, of an attention head
    turn: bool  # queries and keys of the fast weights too
    silu: bool
    v_silu: bool
    momentum: bool
    scale: bool

    @classmethod
    def of(cls, model: LactConfig) -> "Shape":
        attention_dim = model.hidden_size // model.num_attn_heads
        v_silu = model.qkv_silu and not model.no_v_silu
        return cls(
            model.head_dim, attention_dim, not model.ttt_nope, model.qkv_silu, v_silu, model.use_momentum,
            model.learnable_ttt_scale,
        )  # fmt: skip

    @property
    def widths(self) -> list[int]:
        """Columns a head: q, k, v; rates; momentum; scale."""
        return [3 * self.dim, 3, int(self.momentum), int(self.scale)]


@fused
def _prepared(
    rows: Tensor, bias: Tensor, factor: Tensor, offset: Tensor, cos: Tensor, sin: Tensor, shape: Shape
) -> tuple[Any, ...]:
    """-> q, k, v [N, m, h, d]; fast queries [N, H, m, D]; fast keys, keys, values [N, H, 3, m, D]; rates [N, H, m, 3],
    momentum [N, H, m], scale [N, m, H]."""
    qkv, others = rows.split([shape.widths[0], rows.shape[-1] - shape.widths[0]], -1)
    own, others_bias = bias.split([bias.shape[-1] - others.shape[-1], others.shape[-1]], -1)
    q, k, v = (qkv + own if own.shape[-1] else qkv).split(shape.dim, -1)  # [N, m, H, D]
    rates, momentum, scale = (others + others_bias).split(shape.widths[1:], -1)
    fast_q, fast_k = (_fast(x, factor[..., i], offset[..., i], (cos, sin), shape) for i, x in enumerate((q, k)))
    keys, values = (x.transpose(1, 2) for x in (fast_k, F.silu(v) if shape.v_silu else v))
    high = torch.promote_types(rates.dtype, torch.float32)
    q, k, v = (x.flatten(-2).unflatten(-1, (-1, shape.attention_dim)) for x in (q, k, v))
    return (
        rope(q, cos, sin), rope(k, cos, sin), v.contiguous(),
        fast_q.transpose(1, 2).contiguous(), torch.stack([keys, keys, values], 2),
        F.softplus(rates.to(high) + BASE_RATE_INVERSE).transpose(1, 2).contiguous(),
        momentum[..., 0].sigmoid().transpose(1, 2) if shape.momentum else None,
        F.silu(scale[..., 0]) if shape.scale else None,
    )  # fmt: skip


def _fast(x: Tensor, factor: Tensor, offset: Tensor, turn: Table, shape: Shape) -> Tensor:
    """Queries or keys of the fast weights, [N, m, H, D]: SiLU, unit length, position by attention head."""
    x = x * factor + offset
    x = F.silu(x) if shape.silu else x
    high = x.to(torch.promote_types(x.dtype, torch.float32))
    x = (high / (high.norm(dim=-1, keepdim=True) + UNIT_EPS)).to(x.dtype)
    if not shape.turn:
        return x
    heads = x.flatten(-2).unflatten(-1, (-1, shape.attention_dim))
    return rope(heads, *turn).reshape(x.shape)


@fused
def joined(attended: Tensor, found: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """What the attention read [N, m, h, d], and the fast weights [N, m, H, D], normed and scaled [N, m, H] ->
    [N, m, H D]."""
    normed = F.rms_norm(found, weight.shape, weight, READ_EPS)
    if scale is not None:
        normed = normed * scale[..., None]
    return attended.flatten(-2) + normed.flatten(-2).to(attended.dtype)
