"""LaCT's fast weights (arXiv 2505.23884) a chunk at a time: read with the weights as they are, then update them.

A head's memory is a gated MLP, f_W(z) = W1 (SiLU(W0 z) * (W2 z)), whose three matrices take one step of gradient ascent
on sum <f_W(k), v> at the end of each chunk:

    G_i = sum_t rate_i(t) d<f_W(k_t), v_t>/dW_i
    M <- G + m M            m: the chunk's mean momentum
    W <- rows(W + M)        rows() restores each row's first length; Muon: adds M's nearest
                            semi-orthogonal matrix instead of M

What makes branches cheap: within a chunk the weights do not change, and G is a sum over tokens. So a branch reads the
weights of the chunk it starts in, and one that crosses the chunk's end adds its own tokens to those of the main stream.
A token whose rates are 0 leaves no trace.

All chunks of a pass are read at once, when all weights are there: no update depends on what was read.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_refine.kernels.lact import passes
from megatron_refine.kernels.lact.update import Rule, updates


@dataclass(frozen=True)
class Weights:
    """Fast weights as a chunk finds them, of N sequences, each [N, H, 3, I, D]: W0, W2 and the transpose of W1."""

    used: Tensor  # read, and where gradients are taken; in the precision of the tokens
    total: Tensor  # what steps are added to: before its rows were scaled (prenorm), else after; at least fp32
    moved: Tensor  # M, at least fp32

    def detach(self) -> "Weights":
        return Weights(self.used.detach(), self.total.detach(), self.moved.detach())

    def rows(self, index: slice) -> "Weights":
        return Weights(self.used[index], self.total[index], self.moved[index])


@dataclass(frozen=True)
class Tokens:
    """What the update needs of t tokens of N sequences."""

    x: Tensor  # [N, H, 3, t, D]: what W0, W2 and the transpose of W1 are multiplied with: k, k, v
    rates: Tensor  # [N, H, t, 3] of W0, W1, W2
    momentum: Tensor | None  # [N, H, t]

    @classmethod
    def of(cls, k: Tensor, v: Tensor, rates: Tensor, momentum: Tensor | None) -> "Tokens":
        """From k, v [N, t, H, D], rates [N, t, H, 3], momentum [N, t, H]."""
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        own = None if momentum is None else momentum.transpose(1, 2)
        return cls(torch.stack([k, k, v], 2), rates.transpose(1, 2), own)

    def __len__(self) -> int:
        return self.x.shape[3]

    def split(self, size: int) -> list["Tokens"]:
        momentum = [None] * -(-len(self) // size) if self.momentum is None else self.momentum.split(size, 2)
        return [Tokens(*part) for part in zip(self.x.split(size, 3), self.rates.split(size, 2), momentum, strict=True)]

    def part(self, rows: slice, tokens: slice) -> "Tokens":
        own = None if self.momentum is None else self.momentum[rows, :, tokens]
        return Tokens(self.x[rows, :, :, tokens], self.rates[rows, :, tokens], own)

    def detach(self) -> "Tokens":
        return Tokens(self.x.detach(), self.rates.detach(), None if self.momentum is None else self.momentum.detach())

    def repeat(self, n: int) -> "Tokens":
        parts = (None if x is None else x.repeat_interleave(n, 0) for x in vars(self).values())
        return Tokens(*parts)  # type: ignore[arg-type]


def join(parts: list[Tokens]) -> Tokens:
    """Tokens one after the other."""
    momenta = [m for p in parts if (m := p.momentum) is not None]
    x, rates = torch.cat([p.x for p in parts], 3), torch.cat([p.rates for p in parts], 2)
    return Tokens(x, rates, torch.cat(momenta, 2) if momenta else None)


def stacked(w0: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """W0, W2 [.., I, D], W1 [.., D, I] -> [.., 3, I, D]."""
    return torch.stack([w0, w2, w1.mT], -3)


def chunk_lact(initial: Tensor, q: Tensor, tokens: Tokens, rule: Rule) -> tuple[Tensor, list[Weights], list[Tokens]]:
    """Same maths as `recurrent_lact`.

    Args: initial weights [H, 3, I, D]; q [N, T, H, D].
    Returns: what each token reads [N, T, H, D]; the weights at the start of each chunk; the tokens by chunk. The
    weights after a last chunk that is full are not computed: no token reads them.
    """
    first = start(initial, q.shape[0], q.dtype)
    weights = [first, *_trained(first, tokens, initial, rule, -(-q.shape[1] // rule.chunk) - 1)]
    whole = q.shape[1] // rule.chunk  # chunks
    parts = []
    if whole:
        queries = q[:, : whole * rule.chunk].transpose(1, 2).unflatten(2, (whole, rule.chunk))  # [N, H, C, t, D]
        used = torch.stack([w.used for w in weights[:whole]], 2)
        found = _Read.apply(queries.flatten(0, 2), used.flatten(0, 2))
        parts.append(found.view(queries.shape).flatten(2, 3).transpose(1, 2))
    if whole < len(weights):
        parts.append(read(weights[-1].used, q[:, whole * rule.chunk :]))
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0], weights, tokens.split(rule.chunk)


def start(initial: Tensor, count: int, dtype: torch.dtype) -> Weights:
    """The weights of `count` sequences, whose tokens have this dtype, before their first chunk."""
    total = initial.to(torch.promote_types(initial.dtype, torch.float32))
    used, total = (w.expand(count, *w.shape) for w in (total.to(dtype), total))
    return Weights(used, total, total.new_zeros(()).expand(total.shape))


def after(weights: Weights, tokens: Tokens, initial: Tensor, rule: Rule) -> Weights:
    """The weights after a chunk of these tokens."""
    return _trained(weights, tokens, initial, rule, 1)[0]


def _trained(weights: Weights, tokens: Tokens, initial: Tensor, rule: Rule, count: int) -> list[Weights]:
    """After each of the first `count` chunks of the tokens."""
    if not count:
        return []
    high, momentum = weights.total.dtype, None
    if tokens.momentum is not None:
        chunks = tokens.momentum[:, :, : count * rule.chunk].unflatten(2, (count, rule.chunk))
        momentum = chunks.to(high).mean(-1)
    found = updates(
        rule, count, weights.used, weights.total, weights.moved, passes.row_lengths(initial.to(high)), tokens.x,
        tokens.rates, momentum,
    )  # fmt: skip
    return [Weights(*each) for each in found]


def read(used: Tensor, q: Tensor) -> Tensor:
    """f_W(q), shaped as q [N, t, H, D]; used [P, H, 3, I, D], P dividing N: each serves N/P consecutive sequences."""
    states = used.shape[0]
    folded = q.unflatten(0, (states, -1)).flatten(1, 2).transpose(1, 2)  # [P, H, N/P * t, D]
    found = _Read.apply(folded.flatten(0, 1), used.flatten(0, 1).to(q.dtype)).view(folded.shape)
    return found.transpose(1, 2).unflatten(1, (q.shape[0] // states, -1)).flatten(0, 1)


class _Read(torch.autograd.Function):
    """q [s, t, D], used [s, 3, I, D] -> [s, t, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, used: Tensor) -> Tensor:
        z = torch.bmm(q, used[:, :2].flatten(1, 2).mT)  # [s, t, 2 I]
        ctx.save_for_backward(q, used, z)
        return torch.bmm(passes.gated(z), used[:, 2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        q, used, z = ctx.saved_tensors
        z, hidden = passes.gated_backward(torch.bmm(grad, used[:, 2].mT), z)
        into = torch.empty_like(used, memory_format=torch.contiguous_format)
        torch.bmm(z.mT, q, out=into[:, :2].view(len(used), -1, used.shape[-1]))
        torch.bmm(hidden.mT, grad, out=into[:, 2])
        return torch.bmm(z, used[:, :2].flatten(1, 2)), into
