"""The registry of model families. Adding one: a folder beside this file and a line in each table.

Importing this pulls in neither torch nor Megatron; `mixer` does, when called.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, cast

from megatron_refine.config import ModelConfig
from megatron_refine.models.delta_net.config import DeltaNetConfig
from megatron_refine.models.gated_delta_net.config import GatedDeltaNetConfig
from megatron_refine.models.hf import Format
from megatron_refine.models.lact.config import LactConfig

FAMILIES: dict[str, type[ModelConfig]] = {
    "delta_net": DeltaNetConfig,
    "gated_delta_net": GatedDeltaNetConfig,
    "lact": LactConfig,
}
_MIXERS = {"delta_net": "DeltaNetMixer", "gated_delta_net": "GatedDeltaNetMixer", "lact": "LactMixer"}


@dataclass(frozen=True)
class Saved:
    """Bytes of what autograd keeps for the backward pass of one layer."""

    rows: float  # a row: divided by cp, and by tp under sequence parallelism
    heads: float  # a row, of this rank's heads in the mixer: divided by tp * cp
    mlp: float  # a row, of this rank's columns of the MLP: divided by tp * cp
    travelled: float = 0.0  # a row, of this rank's heads, under context parallelism alone
    fixed: float = 0.0  # whatever the layout and the micro-batch
    position: float = 0.0  # a position that branches start from, of this rank's heads
    rollout: float = 0.0  # a branch there, of this rank's heads


class FamilyCost(Protocol):
    """What `models/<family>/flops.py` offers: parameters, matmul FLOPs (a multiply-add counts 2) and bytes."""

    def parameters(self, model: Any) -> int:
        """Trained parameters of the whole model."""

    def rank_parameters(self, model: Any, tp: int, pp: int, stage: int) -> int:
        """Trained parameters held by each tensor parallel rank of pipeline stage `stage`."""

    def layer_flops(self, model: Any, length: int) -> dict[str, int]:
        """Forward FLOPs of a layer, a token of a stream of `length` tokens, by matmul."""

    def fork_flops(self, model: Any) -> int:
        """Forward FLOPs of a layer to read the state at one position."""

    def head_flops(self, model: Any) -> int:
        """Forward FLOPs of the output layer, a row."""

    def state_bytes(self, model: Any, itemsize: int) -> int:
        """Bytes of a layer's state at one position; `itemsize` is that of an activation."""

    def head_norm_width(self, model: Any) -> int:
        """Width of the norm of a head's output: a weight that all heads share."""

    def exchanged_columns(self, model: Any) -> tuple[int, int]:
        """Columns of all heads that context parallel ranks exchange before the mixing of a row, and after it."""

    def handle_bytes(self, model: Any, itemsize: int, length: int, gpu: bool, cp: int) -> float:
        """Bytes that a layer's handle keeps of a pass without gradient, a row, of this rank's heads, until the states
        are taken."""

    def saved_bytes(self, model: Any, itemsize: int, length: int, gpu: bool) -> Saved:
        """Bytes kept for the backward pass of a layer, of sequences of `length` tokens, by the kernels of a GPU or by
        torch on a CPU."""

    def delta_rule(self, model: Any) -> Any:
        """The mixers' delta rule (`DeltaShape`), whose kernels are Triton's on a GPU; None where there is none."""


def mixer(family: str) -> type[Any]:
    """The Megatron module of the family's token mixer. Raises KeyError for an unknown family."""
    name = _MIXERS[family]
    return cast(type[Any], getattr(import_module(f"megatron_refine.models.{family}.mixer"), name))


def flops(family: str) -> FamilyCost:
    """The family's cost model. Raises KeyError for an unknown family."""
    assert family in FAMILIES, family
    return cast(FamilyCost, import_module(f"megatron_refine.models.{family}.flops"))


def hf_format(family: str) -> Format:
    """The family in Hugging Face's format. Raises KeyError for an unknown family."""
    assert family in FAMILIES, family
    return cast(Format, import_module(f"megatron_refine.models.{family}.hf").FORMAT)


def reference(family: str) -> Any:
    """The family's slow evaluation: `logits(model, weights in Hugging Face's format, tokens [B, T])`."""
    assert family in FAMILIES, family
    return import_module(f"megatron_refine.models.{family}.reference")


def serve(family: str) -> Any:
    """The family for SGLang: `MODEL`, the class it loads, and `state_shape(model)`. Needs SGLang."""
    assert family in FAMILIES, family
    return import_module(f"megatron_refine.models.{family}.serve")
