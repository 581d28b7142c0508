"""DeltaNet (arXiv 2406.06484): linear attention whose state is written by the delta rule."""

from megatron_refine.models.delta_net.config import DeltaNetConfig
from megatron_refine.models.delta_net.hf import FORMAT, mixer_tensors
from megatron_refine.models.family import Family, Serving, Slot
from megatron_refine.models.hf import layer_tensors
from megatron_refine.models.layer import Layer
from megatron_refine.models.mixers.delta.cost import DeltaCost


def layers(model: DeltaNetConfig) -> list[Layer]:
    """Return the layers of a model: all alike."""
    heads, k, v = model.num_heads, model.head_dim_k, model.head_dim_v
    cost = DeltaCost(
        model.hidden_size, heads, k, v, channels=heads * (2 * k + v), others=heads, conv_size=model.conv_size
    )
    layer = Layer(f"{__name__}.mixer:DeltaNetMixer", model, cost, layer_tensors(model, mixer_tensors(model)))
    return [layer] * model.num_layers


def slot(model: DeltaNetConfig, tp: int) -> Slot:
    """Return what a server keeps of a request in a layer."""
    return model.state_shape.slot(tp)


FAMILY = Family(
    "delta_net", DeltaNetConfig, layers, FORMAT, f"{__name__}.reference:logits", Serving(f"{__name__}.serve", slot)
)
