"""The convolution, SiLU and unit length as one Triton kernel forward and one backward, which sees the whole projection.

flash-linear-attention's convolution takes channels at one distance from each other. Ours lie group by group with other
columns between them: they would have to be copied there, and their gradients back. The kernels are torch operators, so
that what traces or counts torch's operators knows their shapes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 2048  # elements of a tile; at 4096 the backward kernel takes nearly all registers of an H100
TOKENS = 256  # that a program of the backward pass walks over: it sums the weight's gradient of them


def gpu_convolved(
    rows: Tensor, weight: Tensor, tail: Tensor | None, keys: int, others: Sequence[int]
) -> tuple[Tensor, ...]:
    """As `convolved`; q and k in the precision of the rows."""
    found: tuple[Tensor, ...] = _Convolved.apply(rows, weight, tail, keys, others)
    return found


class _Convolved(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, tail: Tensor | None, keys: int, others: Sequence[int]
    ) -> tuple[Tensor, ...]:
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        weight, tail = weight.contiguous(), None if tail is None else tail.contiguous()
        ctx.save_for_backward(rows, weight, tail)
        ctx.set_materialize_grads(False)
        ctx.keys, ctx.widths = keys, [weight.shape[1], *others]
        return *_forward(rows, weight, tail, keys), *rows.split(ctx.widths, -1)[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, weight, tail = ctx.saved_tensors
        channels, keys = weight.shape[1], ctx.keys
        widths = keys, keys, channels - 2 * keys
        q, k, v = (
            rows.new_zeros(*rows.shape[:3], width) if grad is None else grad.contiguous()
            for grad, width in zip(grads[:3], widths, strict=True)
        )
        into_rows, into_weight, into_tail = _backward(q, k, v, rows, weight, tail)
        for columns, grad in zip(into_rows.split(ctx.widths, -1)[1:], grads[3:], strict=True):
            columns.copy_(grad) if grad is not None else columns.zero_()
        into_weight = into_weight.sum(0).mT.to(weight.dtype)
        return into_rows, into_weight, None if tail is None else into_tail, None, None


@torch.library.custom_op("megatron_refine::short_conv", mutates_args=())
def _forward(rows: Tensor, weight: Tensor, tail: Tensor | None, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    from megatron_refine.kernels.short_conv.tiles import forward_kernel

    found = _outputs(rows, weight, tail, keys)
    length, groups, shape = *rows.shape[1:3], _Tiles(rows, weight, keys)
    grid = (-(-length // shape.tokens), groups * shape.parts, rows.shape[0])
    forward_kernel[grid](
        rows, weight, tail, *found, *rows.stride()[:3], length, groups, **shape.constants(tail), num_warps=4
    )
    return found


@_forward.register_fake
def _outputs(rows: Tensor, weight: Tensor, tail: Tensor | None, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k = (rows.new_empty(*rows.shape[:3], keys) for _ in range(2))
    return q, k, rows.new_empty(*rows.shape[:3], weight.shape[1] - 2 * keys)


@torch.library.custom_op("megatron_refine::short_conv_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, weight: Tensor, tail: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v -> of the rows, but for their other columns, which are left as they are; of the weight, in
    parts [*, G, W, C], fp32; of the tail."""
    from megatron_refine.kernels.short_conv.tiles import backward_kernel

    into_rows, into_weight, into_tail = found = _gradients(q, k, v, rows, weight, tail)
    length, groups, shape = *rows.shape[1:3], _Tiles(rows, weight, q.shape[-1])
    grid = (len(into_weight) // rows.shape[0], groups * shape.parts, rows.shape[0])
    backward_kernel[grid](
        q, k, v, rows, weight, tail, into_rows, into_weight, into_tail, *rows.stride()[:3], *into_rows.stride()[:3],
        length, groups, -(-TOKENS // shape.tokens), **shape.constants(tail), BW=_power(weight.shape[2]), num_warps=4,
    )  # fmt: skip
    return found


@_backward.register_fake
def _gradients(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, weight: Tensor, tail: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    groups, channels, width = weight.shape
    shape = _Tiles(rows, weight, q.shape[-1])
    walked = -(-TOKENS // shape.tokens) * shape.tokens
    extra = 0 if tail is None else width - 1  # tokens before the first
    blocks = rows.shape[0] * -(-(rows.shape[1] + extra) // walked)
    parts = rows.new_empty(blocks, groups, width, channels, dtype=torch.float32)
    return torch.empty_like(rows), parts, rows.new_empty(rows.shape[0], extra, groups, channels)


class _Tiles:
    """How the work is cut: a program has some tokens of a part of a group: its queries, its keys, or some values."""

    def __init__(self, rows: Tensor, weight: Tensor, keys: int):
        self.keys, (_, self.channels, self.width) = keys, weight.shape
        self.columns = _power(keys)
        self.parts = 2 + -(-(self.channels - 2 * keys) // self.columns)
        self.tokens = max(1, min(TILE // self.columns, _power(rows.shape[1])))

    def constants(self, tail: Tensor | None) -> dict[str, int | bool]:
        return {"K": self.keys, "C": self.channels, "W": self.width, "BT": self.tokens, "BD": self.columns,
                "TAIL": tail is not None}  # fmt: skip


def _power(n: int) -> int:
    """The next power of 2."""
    return 1 << (n - 1).bit_length()
