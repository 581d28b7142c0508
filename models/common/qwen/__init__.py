"""What Qwen's hybrids share: Gated DeltaNet layers, and a gated softmax attention layer after every three of them."""

from collections.abc import Sequence

from megatron_refine.models.common.qwen.config import QwenConfig
from megatron_refine.models.family import Serving, Slot
from megatron_refine.models.hf import Mapping, layer_tensors
from megatron_refine.models.layer import Layer
from megatron_refine.models.mixers import attention, gated_delta
from megatron_refine.models.mixers.attention import hf as attention_hf
from megatron_refine.models.mixers.attention.cost import AttentionCost
from megatron_refine.models.mixers.gated_delta import hf as gated_delta_hf

NORM = "megatron_refine.models.common.norm:ZeroCentredNorm"
NORMS = ("input_layernorm", "post_attention_layernorm")
OURS, THEIRS = "decoder.layers.{}.self_attention.", "model.layers.{}.linear_attn."
BY_COLUMNS = ("self_attn.o_proj.weight", "linear_attn.out_proj.weight", "down_proj.weight")


def serving(module: str) -> Serving:
    """Describe how SGLang serves a family of these."""

    def blocks(model: QwenConfig) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(("in_proj_qkv.weight", "conv1d.weight"), model.state_shape.blocks)

    def slot(model: QwenConfig, tp: int) -> Slot:
        return model.state_shape.slot(tp)

    return Serving(module, slot, BY_COLUMNS, alias=True, blocks=blocks)


def layers(model: QwenConfig, projections: dict[str, str], together: Sequence[str] = ()) -> list[Layer]:
    """Return the layers of a model, of two kinds. projections, together: of the linear ones (`gated_delta.hf`)."""
    linear, full = model.linear, model.full
    convolutions = dict.fromkeys("qkv", "conv1d")
    mixed = gated_delta_hf.tensors(linear, OURS, THEIRS, projections, convolutions, "norm", "out_proj", together)
    attended = attention_hf.tensors(full, OURS, "model.layers.{}.self_attn.")

    def tensors(mixer: list[Mapping]) -> tuple[Mapping, ...]:
        return layer_tensors(model, mixer, NORMS)

    kinds = {
        "linear_attention": Layer(gated_delta.MIXER, linear, linear.cost, tensors(mixed), NORM),
        "full_attention": Layer(attention.MIXER, full, AttentionCost(full), tensors(attended), NORM),
    }
    return [kinds[kind] for kind in model.kinds]
