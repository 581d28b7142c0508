"""Qwen3.5's dense text models: Gated DeltaNet layers, and a softmax attention layer after every three of them."""

from megatron_refine.models.family import Family
from megatron_refine.models.hf import layer_tensors
from megatron_refine.models.layer import Layer
from megatron_refine.models.mixers import attention, gated_delta
from megatron_refine.models.mixers.attention import hf as attention_hf
from megatron_refine.models.mixers.attention.cost import AttentionCost
from megatron_refine.models.qwen3_5.config import Qwen35Config
from megatron_refine.models.qwen3_5.hf import FORMAT, NORMS, OURS, linear_tensors

NORM = "megatron_refine.models.common.norm:ZeroCentredNorm"


def layers(model: Qwen35Config) -> list[Layer]:
    """Return the layers of a model, of two kinds."""
    linear, full = model.linear, model.full
    attended = attention_hf.tensors(full, OURS, "model.layers.{}.self_attn.")
    kinds = {
        "linear_attention": Layer(
            gated_delta.MIXER, linear, linear.cost, layer_tensors(model, linear_tensors(model), NORMS), NORM
        ),
        "full_attention": Layer(
            attention.MIXER, full, AttentionCost(full), layer_tensors(model, attended, NORMS), NORM
        ),
    }
    return [kinds[kind] for kind in model.kinds]


FAMILY = Family("qwen3_5", Qwen35Config, layers, FORMAT, f"{__name__}.reference:logits")
