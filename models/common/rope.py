"""Rotary position embedding (arXiv 2104.09864), the two halves of a head paired."""

import functools

import torch
from torch import Tensor

from megatron_refine.kernels.fused import fused

Table = tuple[Tensor, Tensor]
"""Cosines and sines [N or 1, T, d/2] of the angles at each position, in at least fp32."""


@functools.lru_cache(maxsize=2)
def first_positions(length: int, half: int, theta: float, dtype: torch.dtype, device: torch.device) -> Table:
    """The table of positions 0 .. length - 1: computed once for all layers, passes and steps. Arguments as `table`."""
    return table(torch.arange(length, device=device)[None], half, theta, dtype)


def table(positions: Tensor, half: int, theta: float, dtype: torch.dtype) -> Table:
    """Of positions [N or 1, T] and heads of width 2 half. Angles in fp64: long positions keep their precision.

    dtype: of what is turned.
    """
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64, device=positions.device) / half)
    angles = positions[..., None].double() * frequencies
    high = torch.promote_types(dtype, torch.float32)
    return angles.cos().to(high), angles.sin().to(high)


@fused
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [N, T, heads, d] by a table: as many first dimensions as it has angles for."""
    half = cos.shape[-1]
    first, second, rest = x.to(cos.dtype).split([half, half, x.shape[-1] - 2 * half], -1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], -1).to(x.dtype)
