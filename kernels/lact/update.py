"""The updates of LaCT's fast weights over a run of chunks, and their backward pass, in few kernels.

W0, W2 and the transpose of W1, all [I, D], move by one rule and lie in one tensor, so that what follows is one product
or one pass over memory for the three. With x = (k, k, v), and z and p with a column for each matrix:

    z = x W^T          W0 k, W2 k, and W1^T v, which is d<f(k), v> / d hidden
    G = p^T x          p: the other sides of G's products, made of z and the rates
    M <- G + m M;   T <- T + M, or Muon's step for it (muon.py);   W = rows(T)

`rows` scales the rows of W0, W1, W2 to their initial lengths: of W1's transpose, the columns. The backward pass keeps
z, W, T and what Muon starts from. It computes p and Muon's iterations again, the latter of all chunks at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_refine.kernels.lact import passes
from megatron_refine.kernels.lact.muon import iterations, newton_schulz, newton_schulz_backward
from megatron_refine.platform.hardware import on_gpu


@dataclass(frozen=True)
class Rule:
    chunk: int  # tokens between updates
    muon: bool = False
    prenorm: bool = False  # steps add up before the rows are scaled, not after


class Step(NamedTuple):
    """What the backward pass keeps of an update; s = 3 N H."""

    used: Tensor  # [N, H, 3, I, D], W before it
    total: Tensor  # T after it; its rows are scaled (prenorm: not)
    rows: Tensor  # lengths of T's rows before that, [N, H, 2, I, 1] and [N, H, 1, 1, D]
    columns: Tensor
    z: Tensor  # [N, H, 3, chunk, I]
    before: Tensor | None  # M before it, where there is momentum
    unit: Tensor | None  # [s, m, n], what Muon starts from: M / (norm + eps)
    norm: Tensor | None  # [N, H, 3, 1, 1]


def updates(
    rule: Rule, count: int, used: Tensor, total: Tensor, moved: Tensor, lengths: tuple[Tensor, Tensor], x: Tensor,
    rates: Tensor, momentum: Tensor | None,
) -> list[tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """The weights after each of `count` chunks of rule.chunk tokens.

    Args: used, total, moved [N, H, 3, I, D]: W in the precision of x, T and M in at least fp32; lengths of the initial
    weights' rows, by `passes.row_lengths`; x [N, H, 3, t, D]; rates [N, H, t, 3] of W0, W1, W2; momentum [N, H, count].
    Returns: W, T, M after each chunk. Tokens beyond the last one leave no trace.
    """
    found = _Updates.apply(rule, count, used, total, moved, *lengths, x, rates, momentum)
    return list(zip(found[:count], found[count : 2 * count], found[2 * count :], strict=True))


def ascent(used: Tensor, x: Tensor, rates: Tensor) -> tuple[Tensor, Tensor]:
    """G of tokens that find the weights `used` [N, H, 3, I, D]: a sum over them, x [N, H, 3, t, D], rates [N, H, t, 3].

    Returns: G, shaped as the weights, in the precision of x; z [N, H, 3, t, I].
    """
    keys = x.flatten(0, 2)
    z = torch.bmm(keys, used.flatten(0, 2).mT).unflatten(0, x.shape[:3])
    return torch.bmm(passes.sides(z, rates).flatten(0, 2).mT, keys).unflatten(0, x.shape[:3]), z


def ended(
    rule: Rule, step: Tensor, total: Tensor, moved: Tensor, lengths: tuple[Tensor, Tensor], momentum: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The end of a chunk whose G is `step`, without gradient: T, M before it and its momentum [N, H] -> W in the
    precision of T, T, M after it. Shapes as for `updates`."""
    factor = None if momentum is None else momentum[:, :, None, None, None]
    moved, taken, _, _ = _moved(rule, step, None if momentum is None else moved, factor, total.dtype)
    used, total, _, _ = passes.applied(total, taken, *lengths, total.dtype, rule.prenorm)
    return used, total, moved


class _Updates(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rule: Rule, count: int, used: Tensor, total: Tensor, moved: Tensor, rows: Tensor, columns: Tensor,
        x: Tensor, rates: Tensor, momentum: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        steps, found = list[Step](), list[tuple[Tensor, Tensor, Tensor]]()
        for i in range(count):
            span = slice(i * rule.chunk, (i + 1) * rule.chunk)
            step, z = ascent(used, x[:, :, :, span], rates[:, :, span])
            before = None if momentum is None else moved
            moved, taken, unit, norm = _moved(rule, step, before, _factor(momentum, i), total.dtype)
            new, total, long, wide = passes.applied(total, taken, rows, columns, used.dtype, rule.prenorm)
            steps.append(Step(used, total, long, wide, z, before, unit, norm))
            used = new
            found.append((used, total, moved))
        ctx.rule = rule
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows, columns, x, rates, momentum, *(kept for step in steps for kept in step))
        return tuple(tensor for column in zip(*found, strict=True) for tensor in column)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        rows, columns, x, rates, momentum, *kept = ctx.saved_tensors
        size = len(Step._fields)
        steps = [Step(*kept[i : i + size]) for i in range(0, len(kept), size)]
        count = len(steps)
        into_used, into_total, into_moved = (grads[i : i + count] for i in range(0, 3 * count, count))
        walk = _Backward(ctx.rule, steps, rows, columns, x, rates, momentum)
        used, total, moved = into_used[-1], into_total[-1], into_moved[-1]
        for i in range(count - 1, -1, -1):
            earlier = into_used[i - 1] if i else None
            used, total, moved = walk.step(i, used, total, moved, earlier)
            if i:
                total, moved = _sum(total, into_total[i - 1]), _sum(moved, into_moved[i - 1])
        into_rows, into_columns = (torch.stack(parts).sum((0, 1)) for parts in (walk.into_rows, walk.into_columns))
        factors = torch.stack(walk.into_factors[::-1], -1) if momentum is not None else None
        return None, None, used, total, moved, into_rows, into_columns, walk.into_x, walk.rates_gradient(), factors


class _Backward:
    """A walk from the last update to the first; collects the gradients of all but the weights."""

    def __init__(
        self, rule: Rule, steps: Sequence[Step], rows: Tensor, columns: Tensor, x: Tensor, rates: Tensor,
        momentum: Tensor | None,
    ):  # fmt: skip
        self.rule, self.steps, self.rows, self.columns = rule, steps, rows, columns
        self.x, self.rates, self.momentum = x, rates, momentum
        self.iterations = iterations([step.unit for step in steps if step.unit is not None]) if rule.muon else []
        self.into_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        self.into_x[:, :, :, len(steps) * rule.chunk :] = 0
        self.into_rates, self.into_factors = list[Tensor](), list[Tensor]()  # from the last to the first
        self.into_rows, self.into_columns = list[Tensor](), list[Tensor]()

    def step(
        self, i: int, used: Tensor | None, total: Tensor | None, moved: Tensor | None, earlier: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of W, T, M after update i -> those of W, T, M before it, the former on top of `earlier`."""
        step, span = self.steps[i], slice(i * self.rule.chunk, (i + 1) * self.rule.chunk)
        used = torch.zeros_like(step.used) if used is None else used
        total, into_rows, into_columns = passes.applied_backward(
            used, total, step.total, (step.rows, step.columns), (self.rows, self.columns), self.rule.prenorm
        )
        self.into_rows.append(into_rows)
        self.into_columns.append(into_columns)
        into_step, moved = self._into_step(i, total, moved)
        keys, flat = self.x.flatten(0, 2)[:, span], step.used.flatten(0, 2)
        sides = torch.bmm(keys, into_step.mT).unflatten(0, self.x.shape[:3])
        z, sides, into_rates = passes.sides_backward(sides, step.z, self.rates[:, :, span])
        self.into_rates.append(into_rates)
        z, into_keys = z.flatten(0, 2), self.into_x.view(-1, *self.x.shape[3:])[:, span]
        torch.bmm(sides.flatten(0, 2), into_step, out=into_keys)
        into_keys.baddbmm_(z, flat)
        new = torch.bmm(z.mT, keys) if earlier is None else torch.baddbmm(earlier.flatten(0, 2), z.mT, keys)
        return new.view(step.used.shape), total, moved

    def _into_step(self, i: int, taken: Tensor, moved: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Gradients of what T took and of M -> of G [s, I, D] in the precision of x, and of M before."""
        step, muon = self.steps[i], None
        if step.unit is not None:
            count = len(step.unit)
            own = [each.rows(slice(i * count, (i + 1) * count)) for each in self.iterations]
            muon = _stack(newton_schulz_backward(own, _wide(taken)), taken.shape), _stack(step.unit, taken.shape)
        found = passes.moved_backward(
            taken, moved, muon, step.norm, step.before, _factor(self.momentum, i), self.x.dtype
        )
        if self.momentum is not None:
            self.into_factors.append(found[2])
        return found[0].flatten(0, 2), found[1] if self.momentum is not None else None

    def rates_gradient(self) -> Tensor:
        """Of all tokens."""
        done = len(self.steps) * self.rule.chunk
        return torch.cat([*self.into_rates[::-1], torch.zeros_like(self.rates[:, :, done:])], 2)


def _moved(
    rule: Rule, step: Tensor, before: Tensor | None, factor: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """G -> M, what T takes of it, and what Muon's backward pass keeps."""
    if not rule.muon:
        moved = passes.moved(step, before, factor, dtype)
        return moved, moved, None, None
    low = step.dtype if on_gpu(step) else dtype  # as the official code, where it pays
    moved, unit, norm = passes.unit(step, before, factor, dtype, low)
    unit = _wide(unit)
    return moved, _stack(newton_schulz(unit), step.shape), unit, norm


def _factor(momentum: Tensor | None, i: int) -> Tensor | None:
    return None if momentum is None else momentum[:, :, i, None, None, None]


def _wide(x: Tensor) -> Tensor:
    """[N, H, 3, I, D] -> [s, m, n], m the smaller one."""
    flat = x.flatten(0, 2)
    return flat.mT if x.shape[-2] > x.shape[-1] else flat


def _stack(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse."""
    return (x.mT if shape[-2] > shape[-1] else x).unflatten(0, shape[:3])


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
