"""Rows of a list of tensors, one a chunk of the sequence: a state is read at a position without touching the rest."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def pick(chunks: Sequence[Tensor], where: Sequence[tuple[int, int]]) -> Tensor:
    """chunks: tensors [N, ...] of one shape but for N; where: P pairs (chunk, row) -> [P, ...], in the graph.

    The gradient goes to the chunks that were read, each filled once however many of its rows were: a stack of slices
    would clear a whole chunk for every slice.
    """
    touched = sorted({chunk for chunk, _ in where})
    place = {chunk: i for i, chunk in enumerate(touched)}
    picked: Tensor = _Pick.apply([(place[chunk], row) for chunk, row in where], *(chunks[chunk] for chunk in touched))
    return picked


class _Pick(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, where: list[tuple[int, int]], *chunks: Tensor) -> Tensor:
        ctx.where, ctx.shapes = where, [chunk.shape for chunk in chunks]
        return torch.stack([chunks[i][row] for i, row in where])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = [grad.new_zeros(shape) for shape in ctx.shapes]
        for (i, row), part in zip(ctx.where, grad.unbind(0), strict=True):
            found[i][row] += part
        return None, *found
