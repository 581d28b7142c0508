"""What the attention mixer makes of projected rows, and of what was read for them: one pass over memory each.

The facts are in mixer.py.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_refine.kernels.fused import fused
from megatron_refine.models.common.rope import Table, rope


class Norms(NamedTuple):
    """What norms queries and keys, each head by itself."""

    q: Tensor  # [d]
    k: Tensor
    eps: float
    zero_centred: bool


def split(rows: Tensor, queries: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [..., U, *], each unit `queries` heads -> queries with what follows them in a head [..., U, queries, *],
    keys and values [..., U, d]."""
    heads, k, v = rows.split([rows.shape[-1] - 2 * dim, dim, dim], -1)
    return heads.unflatten(-1, (queries, -1)), k, v


@fused
def prepared(
    rows: Tensor, queries: int, dim: int, norms: Norms | None, turn: Table | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [N, m, U, *] -> q [N, m, U queries, d], k, v [N, m, U, d], normed and turned; keys and values are no views
    of the rows, which need not outlive the pass with them."""
    heads, k, v = split(rows, queries, dim)
    q = heads[..., :dim].flatten(2, 3)
    if norms is not None:
        q, k = (normed(x, w, norms.eps, norms.zero_centred) for x, w in ((q, norms.q), (k, norms.k)))
    if turn is not None:
        q, k = rope(q, *turn), rope(k, *turn)
    return q, k.contiguous(), v.contiguous()


def normed(x: Tensor, weight: Tensor, eps: float, zero_centred: bool) -> Tensor:
    """RMSNorm over the last dimension, statistics and weight in at least fp32."""
    high = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(high), weight.shape, weight.to(high) + zero_centred, eps).to(x.dtype)


@fused
def mean_squares(rows: Tensor, queries: int, dim: int, units: int) -> Tensor:
    """Rows [..., U, *] -> their part of the mean square of the queries, and of the keys, of `units` units, [..., 2]."""
    heads, k, _ = split(rows, queries, dim)
    high = torch.promote_types(rows.dtype, torch.float32)
    of_q, of_k = heads[..., :dim].to(high).square().sum((-1, -2, -3)), k.to(high).square().sum((-1, -2))
    return torch.stack([of_q / (units * queries * dim), of_k / (units * dim)], -1)


@fused
def scaled(rows: Tensor, queries: int, dim: int, factors: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    """Rows [..., U, *], with queries and keys times factors [..., 2] and weights [U, queries, d], [U, d]."""
    heads, k, v = split(rows, queries, dim)
    of_q, of_k = factors[..., None, None].unbind(-3)
    q = (heads[..., :dim] * of_q[..., None] * weights[0]).to(rows.dtype)
    k = (k * of_k * weights[1]).to(rows.dtype)
    return torch.cat([torch.cat([q, heads[..., dim:]], -1).flatten(-2), k, v], -1)


@fused
def gated(mixed: Tensor, gate: Tensor) -> Tensor:
    """Outputs [..., h, d] times sigmoid of as many gates."""
    high = torch.promote_types(mixed.dtype, torch.float32)
    return (mixed * gate.reshape(mixed.shape).to(high).sigmoid()).to(mixed.dtype)
