"""How a parameter is cut over tensor-parallel ranks: one rule for initialisation, conversion and tests.

Megatron marks each sharded parameter with `partition_dim` and `partition_stride`: with stride s the dimension holds s
equal blocks (gate and up of a gated MLP), and every rank has its part of each block.
"""

import torch
from torch import Tensor, nn


def is_sharded(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "tensor_model_parallel", False)


def shard(full: Tensor, parameter: nn.Parameter, rank: int, size: int) -> Tensor:
    """The part of a full tensor that tensor-parallel rank `rank` of `size` holds."""
    if not is_sharded(parameter) or size == 1:
        return full
    dim, stride = parameter.partition_dim, getattr(parameter, "partition_stride", 1)  # type: ignore[attr-defined]
    return torch.cat([block.chunk(size, dim)[rank] for block in full.chunk(stride, dim)], dim)


def unshard(parts: list[Tensor], parameter: nn.Parameter) -> Tensor:
    """The full tensor from the parts of all ranks, in rank order."""
    if not is_sharded(parameter) or len(parts) == 1:
        return parts[0]
    dim, stride = parameter.partition_dim, getattr(parameter, "partition_stride", 1)  # type: ignore[attr-defined]
    blocks = [part.chunk(stride, dim) for part in parts]
    return torch.cat([block[i] for i in range(stride) for block in blocks], dim)


def full_shape(parameter: nn.Parameter, size: int) -> torch.Size:
    """Shape of the full tensor when `size` ranks hold parts like this one."""
    shape = list(parameter.shape)
    if is_sharded(parameter):
        shape[parameter.partition_dim] *= size  # type: ignore[attr-defined]
    return torch.Size(shape)
