"""Rows of a stream that are read beside what computes with all of them: their gradients enter the stream's in place.

The backward pass of an index would clear a tensor as large as the stream, and add it to the stream's gradient.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Waiting = list[tuple[tuple[Tensor, Tensor], Tensor]]


@dataclass(frozen=True)
class Tap:
    """A stream x [B, T, ...], open to reads."""

    stream: Tensor  # what computes with all rows takes this one, alone, and makes a gradient of its own for it
    _waiting: Waiting

    @classmethod
    def on(cls, x: Tensor) -> "Tap":
        waiting: Waiting = []
        return cls(_Open.apply(x, waiting), waiting)

    def read(self, sequences: Tensor, numbers: Tensor) -> Tensor:
        """Rows numbers[i] of sequences[i], whose shapes broadcast to [*]: -> [*, ...], in the graph."""
        found: Tensor = _Read.apply(self.stream, self._waiting, sequences, numbers)
        return found


class _Open(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, waiting: Waiting) -> Tensor:
        ctx.waiting, ctx.like = waiting, (x.shape, {"dtype": x.dtype, "device": x.device})
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        shape, options = ctx.like
        if ctx.waiting and (grad is None or 0 in grad.stride()):  # none of its own
            grad = torch.zeros(shape, **options) if grad is None else grad.clone(memory_format=torch.contiguous_format)
        for index, rows in ctx.waiting:
            grad.index_put_(index, rows.to(grad.dtype), accumulate=True)  # type: ignore[union-attr]
        ctx.waiting.clear()
        return grad, None


class _Read(torch.autograd.Function):
    """Its gradients wait for the backward pass of `_Open`, which comes later: it made `stream`, an input here."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, waiting: Waiting, sequences: Tensor, numbers: Tensor) -> Tensor:
        ctx.waiting, ctx.index = waiting, (sequences, numbers)
        return stream[sequences, numbers]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        ctx.waiting.append((ctx.index, grad))
        return None, None, None, None
