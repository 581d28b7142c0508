"""What ranks tell one another, as JSON and safetensors: whoever sends a pickle runs code on the rank that reads it."""

import json
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from megatron_refine.platform import hardware


def everyone(value: Any, group: Any = None) -> list[Any]:
    """The value of each rank of `group` (default: all), in rank order. Collective.

    value: None, a truth value, a number, a text, or a list, a tuple or a dictionary of such. Raises TypeError for
    anything else.
    """
    found = _everyones_bytes(json.dumps(_encoded(value)).encode(), group)
    return [_decoded(json.loads(data)) for data in found]


def everyones_tensors(value: dict[str, Tensor], group: Any = None) -> list[dict[str, Tensor]]:
    """The tensors of each rank of `group`, in rank order, on the CPU. Collective."""
    found = _everyones_bytes(
        save(
            {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in value.items()}
        ),
        group,
    )
    return [load(data) for data in found]


def _everyones_bytes(data: bytes, group: Any) -> list[bytes]:
    device = hardware.device() if dist.get_backend(group) == "nccl" else hardware.CPU
    own = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    size = torch.tensor([len(own)], device=device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group=group)
    lengths = [int(s) for s in sizes]
    padded = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return [part[:length].cpu().numpy().tobytes() for part, length in zip(parts, lengths, strict=True)]


def _encoded(value: Any) -> Any:
    """JSON has neither tuples nor keys that are no texts."""
    if isinstance(value, dict):
        return {"dict": [[_encoded(k), _encoded(v)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_encoded(v) for v in value]}
    return [_encoded(v) for v in value] if isinstance(value, list) else value


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        ((kind, parts),) = value.items()
        if kind == "dict":
            return {_decoded(k): _decoded(v) for k, v in parts}
        return tuple(_decoded(v) for v in parts)
    return [_decoded(v) for v in value] if isinstance(value, list) else value
