"""A model is a list of layers: what each is made of, where its tensors stand, what it costs. No torch, no Megatron."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, ClassVar, Protocol, cast

from megatron_refine.models.hf import Mapping


@dataclass(frozen=True)
class Saved:
    """Bytes of what autograd keeps for the backward pass of a mixer."""

    heads: float  # a row, of this rank's heads: divided by tp * cp
    travelled: float = 0.0  # a row, of this rank's heads, under context parallelism alone
    fixed: float = 0.0  # whatever the layout and the micro-batch
    position: float = 0.0  # a position that branches start from, of this rank's heads
    rollout: float = 0.0  # a branch there, of this rank's heads


class MixerCost(Protocol):
    """Parameters, matmul FLOPs (a multiply-add counts 2) and bytes of one layer's mixer, over all ranks."""

    kernels: ClassVar[str]
    """The package of `kernels` that mixes the sequence, such as `delta_rule`."""

    def parameters(self, tp: int) -> int:
        """Parameters of each of `tp` tensor parallel ranks."""

    def partial(self, tp: int) -> int:
        """Count those that every rank has whole, with a part of the gradient: norms of heads."""

    def flops(self, length: int, before: int = 0) -> dict[str, int]:
        """Forward FLOPs, a token of a stream of `length` tokens that follows `before` others, by matmul."""

    def fork_flops(self) -> int:
        """Forward FLOPs to read the state at one position."""

    def state_bytes(self, itemsize: int) -> int:
        """Bytes of the state at one position; `itemsize` is that of an activation."""

    def exchanged_columns(self, ranks: int) -> tuple[int, int]:
        """Columns of all heads that context parallel ranks exchange before the mixing of a row, and after it; `ranks`
        is tp * cp."""

    def handle_bytes(self, itemsize: int, length: int, gpu: bool, cp: int) -> float:
        """Bytes that a handle keeps of a pass without gradient, a row, until the states are taken."""

    def saved_bytes(self, itemsize: int, length: int, gpu: bool) -> Saved:
        """Bytes kept for the backward pass, of sequences of `length` tokens, by the kernels of a GPU or by torch on a
        CPU."""


@dataclass(frozen=True)
class Layer:
    """Norm, mixer, norm, gated MLP."""

    mixer: str  # its Megatron module, as in `package.module:Class`
    settings: Any  # that module's `model`
    cost: MixerCost
    tensors: tuple[Mapping, ...] = field(repr=False)  # of the whole layer; {} is its number
    norm: str = "megatron_refine.models.common.norm:RMSNorm"  # before the mixer and the MLP
    behind: bool = False  # or of what they return, before it is added to the rows

    def mixer_class(self) -> type[Any]:
        """Import the mixer's module."""
        return cast(type[Any], named(self.mixer))

    def norm_class(self) -> type[Any]:
        """Import the norms' module."""
        return cast(type[Any], named(self.norm))


def alike(layers: Sequence[Layer]) -> bool:
    """Tell whether all layers have the same tensors: checkpoints then stack them under one name."""
    return len({tuple((mapping.ours, mapping.shape) for mapping in layer.tensors) for layer in layers}) <= 1


def named(path: str) -> Any:
    """Return what an import path names, as in `package.module:name`."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
