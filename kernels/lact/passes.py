"""What lies between the products of LaCT's updates: one pass over memory each, forward and backward.

Matrices [N, H, 3, I, D]: W0, W2 and the transpose of W1. Columns z [N, H, 3, t, I]: W0 k, W2 k, W1^T v. Rates
[N, H, t, 3] of W0, W1, W2.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_refine.kernels.fused import fused

ROW_EPS, FROBENIUS_EPS = 1e-5, 1e-7


def row_lengths(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Of W0 and W2 [.., 2, I, 1]; of W1, the columns of its transpose, [.., 1, 1, D]."""
    first, last = weights.split([2, 1], -3)
    return (
        torch.linalg.vector_norm(first, dim=-1, keepdim=True),
        torch.linalg.vector_norm(last, dim=-2, keepdim=True),
    )


@fused
def gated(z: Tensor) -> Tensor:
    """[gate | up] [s, t, 2 I] -> SiLU(gate) up."""
    gate, up = z.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


@fused
def gated_backward(grad: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """-> the gradient of z, and the result of `gated` again."""
    gate, up = z.chunk(2, -1)
    s = _Silu.of(gate)
    return torch.cat([grad * up * s.slope, grad * s.silu], -1), s.silu * up


class _Silu(NamedTuple):
    silu: Tensor
    slope: Tensor
    sigmoid: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "_Silu":
        sigmoid = x.sigmoid()
        return cls(x * sigmoid, sigmoid * (1 + x * (1 - sigmoid)), sigmoid)

    def bend(self, x: Tensor) -> Tensor:
        """The second derivative."""
        return self.sigmoid * (1 - self.sigmoid) * (2 + x * (1 - 2 * self.sigmoid))


@fused
def sides(z: Tensor, rates: Tensor) -> Tensor:
    """d<f(k), v> / d(W0 k) and / d(W2 k), and the hidden rows, each times its rate: the sides of G's products."""
    gate, up, into = z.unbind(-3)
    s, (rate0, rate1, rate2) = _Silu.of(gate), rates.to(z.dtype).split(1, -1)
    return torch.stack([into * up * s.slope * rate0, into * s.silu * rate2, s.silu * up * rate1], -3)


@fused
def sides_backward(grad: Tensor, z: Tensor, rates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> the gradient of z, the sides again, the gradient of the rates."""
    gate, up, into = z.unbind(-3)
    s, (rate0, rate1, rate2) = _Silu.of(gate), rates.to(z.dtype).split(1, -1)
    sloped, flat, hidden = into * up * s.slope, into * s.silu, s.silu * up
    into_rates = torch.stack([(g * x).sum(-1) for g, x in zip(_by_rate(grad), (sloped, hidden, flat), strict=True)], -1)
    grad0, grad1, grad2 = (g * r for g, r in zip(_by_rate(grad), (rate0, rate1, rate2), strict=True))
    into_gate = grad0 * into * up * s.bend(gate) + (grad2 * into + grad1 * up) * s.slope
    into_up, into_into = grad0 * into * s.slope + grad1 * s.silu, grad0 * up * s.slope + grad2 * s.silu
    found = torch.stack([into_gate, into_up, into_into], -3)
    return found, torch.stack([sloped * rate0, flat * rate2, hidden * rate1], -3), into_rates.to(rates.dtype)


def _by_rate(columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Columns of W0, W2, W1 -> in the order of the rates."""
    first, third, second = columns.unbind(-3)
    return first, second, third


@fused
def moved(step: Tensor, before: Tensor | None, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """G + m M in `dtype`; factor m [N, H, 1, 1, 1]."""
    found = step.to(dtype)
    return found if before is None or factor is None else found + factor * before


@fused
def unit(
    step: Tensor, before: Tensor | None, factor: Tensor | None, dtype: torch.dtype, low: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The same; then, of Frobenius norm 1 and in `low`, what Muon starts from; the norms [N, H, 3, 1, 1]."""
    found = step.to(dtype)
    if before is not None and factor is not None:
        found = found + factor * before
    norm = torch.linalg.vector_norm(found, dim=(-2, -1), keepdim=True)
    return found, (found / (norm + FROBENIUS_EPS)).to(low), norm


@fused
def moved_backward(
    taken: Tensor, later: Tensor | None, muon: tuple[Tensor, Tensor] | None, norm: Tensor | None,
    before: Tensor | None, factor: Tensor | None, dtype: torch.dtype,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of what T took, or (muon) of Muon's start beside that start, and, later, of M -> of G in `dtype`; with
    momentum of the M before and of its factor [N, H]."""
    grad = taken
    if muon is not None and norm is not None:
        into, start = (x.to(taken.dtype) for x in muon)
        along = (into * start).sum((-2, -1), keepdim=True)
        grad = into / (norm + FROBENIUS_EPS) - start * torch.where(norm > 0, along / norm, 0.0)
    if later is not None:
        grad = grad + later
    if before is None or factor is None:
        return (grad.to(dtype),)
    return grad.to(dtype), factor * grad, (grad * before).sum((-3, -2, -1))


@fused
def applied(
    total: Tensor, taken: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype, prenorm: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """T + what it takes, rows scaled to the lengths -> W in `dtype`, T (prenorm: before that), its lengths before."""
    found = total + taken.to(total.dtype)
    own = row_lengths(found)
    parts = zip(found.split([2, 1], -3), own, (rows, columns), strict=True)
    scaled = torch.cat([x * (length / (now + ROW_EPS)) for x, now, length in parts], -3)
    kept = found if prenorm else scaled
    return scaled.to(dtype, copy=scaled.dtype == dtype and not prenorm), kept, *own


@fused
def applied_backward(
    used: Tensor, later: Tensor | None, total: Tensor, own: tuple[Tensor, Tensor], lengths: tuple[Tensor, Tensor],
    prenorm: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of W and, later, of T -> of T before, which is that of what it took, and of the lengths, all [N, ..].

    total, own: what `applied` returned."""
    grad = used.to(total.dtype)
    if later is not None and not prenorm:
        grad = grad + later
    found, into_lengths = [], []
    for g, t, now, length, dim in zip(
        grad.split([2, 1], -3), total.split([2, 1], -3), own, lengths, (-1, -2), strict=True
    ):
        scale = length / (now + ROW_EPS)
        before = t if prenorm else t / torch.where(scale > 0, scale, 1.0)
        along = (g * before).sum(dim, keepdim=True) / (now + ROW_EPS)
        found.append(scale * g - before * torch.where(now > 0, scale * along / now, 0.0))
        into_lengths.append(along)
    into = torch.cat(found, -3)
    return into if later is None or not prenorm else into + later, *into_lengths
