"""Olmo-Hybrid: Gated DeltaNet layers, and a softmax attention layer after every three of them, normed behind."""

from megatron_refine.models.family import Family
from megatron_refine.models.hf import layer_tensors
from megatron_refine.models.layer import Layer
from megatron_refine.models.mixers import attention, gated_delta
from megatron_refine.models.mixers.attention import hf as attention_hf
from megatron_refine.models.mixers.attention.config import AttentionConfig
from megatron_refine.models.mixers.attention.cost import AttentionCost
from megatron_refine.models.mixers.gated_delta import GatedDelta
from megatron_refine.models.olmo_hybrid.config import OlmoHybridConfig
from megatron_refine.models.olmo_hybrid.hf import FORMAT, NORMS, OURS, linear_tensors

HEAD_EPS = 1e-5  # of the norm of a linear head's output, whatever the others' is


def layers(model: OlmoHybridConfig) -> list[Layer]:
    """Return the layers of a model, of two kinds."""
    linear = GatedDelta(
        model.hidden_size, model.linear_num_key_heads, model.linear_key_head_dim, model.linear_num_value_heads,
        model.linear_value_head_dim, model.linear_conv_kernel_dim, HEAD_EPS,
        allow_neg_eigval=model.linear_allow_neg_eigval,
    )  # fmt: skip
    full = AttentionConfig(
        model.hidden_size, model.num_attention_heads, model.num_key_value_heads, model.head_dim, qk_norm="projection",
        rotary_dims=model.head_dim if model.rope_theta else 0, rope_theta=model.rope_theta or 1.0, eps=model.norm_eps,
    )  # fmt: skip
    attended = attention_hf.tensors(full, OURS, "model.layers.{}.self_attn.")
    before, behind = NORMS["linear_attention"], NORMS["full_attention"]
    kinds = {
        "linear_attention": Layer(
            gated_delta.MIXER, linear, linear.cost, layer_tensors(model, linear_tensors(model), before)
        ),
        "full_attention": Layer(
            attention.MIXER, full, AttentionCost(full), layer_tensors(model, attended, behind, behind=True), behind=True
        ),
    }
    return [kinds[kind] for kind in model.kinds]


FAMILY = Family("olmo_hybrid", OlmoHybridConfig, layers, FORMAT, f"{__name__}.reference:logits")
