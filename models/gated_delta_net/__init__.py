"""Gated DeltaNet (arXiv 2412.06464): the delta rule with decay, and gated outputs."""

from megatron_refine.models.family import Family, Serving
from megatron_refine.models.gated_delta_net.config import GatedDeltaNetConfig
from megatron_refine.models.gated_delta_net.hf import FORMAT, mixer_tensors
from megatron_refine.models.hf import layer_tensors
from megatron_refine.models.layer import Layer
from megatron_refine.models.mixers.delta.cost import DeltaCost


def layers(model: GatedDeltaNetConfig) -> list[Layer]:
    """Return the layers of a model: all alike."""
    heads, k, v = model.value_heads, model.head_dim, model.head_dim_v
    cost = DeltaCost(
        model.hidden_size, heads, k, v, channels=2 * model.num_heads * k + heads * v,
        others=heads * (2 + v * model.use_gate), conv_size=model.conv_size, vectors=2 * heads, gated_rule=True,
        gated_output=model.use_gate,
    )  # fmt: skip
    layer = Layer(f"{__name__}.mixer:GatedDeltaNetMixer", model, cost, layer_tensors(model, mixer_tensors(model)))
    return [layer] * model.num_layers


FAMILY = Family(
    "gated_delta_net", GatedDeltaNetConfig, layers, FORMAT, f"{__name__}.reference:logits", Serving(f"{__name__}.serve")
)
