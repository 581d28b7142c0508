"""LaCT (arXiv 2505.23884): sliding-window attention beside fast weights that are trained on each large chunk."""

from megatron_refine.models.family import Family, Serving, Slot
from megatron_refine.models.hf import layer_tensors
from megatron_refine.models.lact.config import LactConfig
from megatron_refine.models.lact.cost import LactCost
from megatron_refine.models.lact.hf import FORMAT, mixer_tensors
from megatron_refine.models.layer import Layer

MUON = 10.0  # bf16-like products of its own, and five iterations that magnify them


def layers(model: LactConfig) -> list[Layer]:
    """Return the layers of a model: all alike."""
    tensors = layer_tensors(model, mixer_tensors(model))
    return [Layer(f"{__name__}.mixer:LactMixer", model, LactCost(model), tensors)] * model.num_layers


def slot(model: LactConfig, tp: int) -> Slot:
    """Return what a server keeps of a request in a layer: fast weights with what they gather, and the window."""
    size = 3 * model.inner_dim * model.head_dim
    return Slot(
        [(model.window_size, 2 * model.hidden_size // tp)], (model.num_lact_heads // tp, model.planes * size + 1)
    )


def _blocks(model: LactConfig) -> dict[str, list[int]]:
    return dict.fromkeys(("qkv.weight", "qkv.bias"), [model.hidden_size] * 3)


FAMILY = Family(
    "lact", LactConfig, layers, FORMAT, f"{__name__}.reference:logits",
    Serving(f"{__name__}.serve", slot, blocks=_blocks),
    error_factor=lambda model: MUON if model.use_muon else 1.0,
)  # fmt: skip
