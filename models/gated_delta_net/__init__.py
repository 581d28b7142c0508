"""Gated DeltaNet (arXiv 2412.06464): the delta rule with a decay of the state, and a gated output norm."""

from megatron_refine.models.family import Family, Serving, Slot
from megatron_refine.models.gated_delta_net.config import GatedDeltaNetConfig
from megatron_refine.models.gated_delta_net.hf import FORMAT
from megatron_refine.models.hf import layer_tensors
from megatron_refine.models.layer import Layer
from megatron_refine.models.mixers.gated_delta import MIXER, GatedDelta
from megatron_refine.models.mixers.gated_delta.hf import tensors


def layers(model: GatedDeltaNetConfig) -> list[Layer]:
    """Return the layers of a model: all alike."""
    mixer = GatedDelta(
        model.hidden_size, model.num_heads, model.head_dim, model.value_heads, model.head_dim_v, model.conv_size,
        model.norm_eps, model.use_gate, model.allow_neg_eigval,
    )  # fmt: skip
    own = tensors(mixer, "decoder.layers.{}.self_attention.", "model.layers.{}.attn.")
    return [Layer(MIXER, mixer, mixer.cost, layer_tensors(model, own))] * model.num_layers


def slot(model: GatedDeltaNetConfig, tp: int) -> Slot:
    """Return what a server keeps of a request in a layer."""
    return model.state_shape.slot(tp)


FAMILY = Family(
    "gated_delta_net",
    GatedDeltaNetConfig,
    layers,
    FORMAT,
    f"{__name__}.reference:logits",
    Serving(f"{__name__}.serve", slot),
)
