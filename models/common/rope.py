"""Rotary position embedding (arXiv 2104.09864), the two halves of a head paired."""

import torch
from torch import Tensor

from megatron_refine.kernels.fused import fused


@fused
def rope(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Turn x [N, T, heads, d] by its positions [N or 1, T]. Angles in fp64: long positions keep their precision."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    angles = positions[..., None].double() * frequencies
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = angles.cos().to(dtype)[:, :, None], angles.sin().to(dtype)[:, :, None]
    first, second = x.to(dtype).split([half, half], -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1).to(x.dtype)
