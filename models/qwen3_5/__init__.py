"""Qwen3.5's dense text models: Gated DeltaNet layers, and a softmax attention layer after every three of them."""

from megatron_refine.models.family import Family
from megatron_refine.models.hf import layer_tensors
from megatron_refine.models.layer import Layer
from megatron_refine.models.mixers import attention, gated_delta
from megatron_refine.models.mixers.attention import hf as attention_hf
from megatron_refine.models.mixers.attention.config import AttentionConfig
from megatron_refine.models.mixers.attention.cost import AttentionCost
from megatron_refine.models.mixers.gated_delta import GatedDelta
from megatron_refine.models.qwen3_5.config import Qwen35Config
from megatron_refine.models.qwen3_5.hf import FORMAT, NORMS, OURS, linear_tensors

NORM = "megatron_refine.models.common.norm:ZeroCentredNorm"


def layers(model: Qwen35Config) -> list[Layer]:
    """Return the layers of a model, of two kinds."""
    linear = GatedDelta(
        model.hidden_size, model.linear_num_key_heads, model.linear_key_head_dim, model.linear_num_value_heads,
        model.linear_value_head_dim, model.linear_conv_kernel_dim, model.norm_eps,
    )  # fmt: skip
    full = AttentionConfig(
        model.hidden_size, model.num_attention_heads, model.num_key_value_heads, model.head_dim, gate=True,
        qk_norm="head", zero_centred=True, rotary_dims=model.rotary_dims, rope_theta=model.rope_theta,
        eps=model.norm_eps,
    )  # fmt: skip
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
