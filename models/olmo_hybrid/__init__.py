"""Olmo-Hybrid: Gated DeltaNet layers, and a softmax attention layer after every three of them, normed behind."""

from megatron_refine.models.family import Family
from megatron_refine.models.hf import layer_tensors
from megatron_refine.models.layer import Layer
from megatron_refine.models.mixers import attention, gated_delta
from megatron_refine.models.mixers.attention import hf as attention_hf
from megatron_refine.models.mixers.attention.cost import AttentionCost
from megatron_refine.models.mixers.gated_delta import hf as gated_delta_hf
from megatron_refine.models.olmo_hybrid.config import OlmoHybridConfig
from megatron_refine.models.olmo_hybrid.hf import FORMAT, NORMS, OURS, THEIRS


def layers(model: OlmoHybridConfig) -> list[Layer]:
    """Return the layers of a model, of two kinds."""
    linear, full = model.linear, model.full
    own = gated_delta_hf.tensors(linear, OURS, THEIRS)
    attended = attention_hf.tensors(full, OURS, "model.layers.{}.self_attn.")
    before, behind = NORMS["linear_attention"], NORMS["full_attention"]
    kinds = {
        "linear_attention": Layer(gated_delta.MIXER, linear, linear.cost, layer_tensors(model, own, before)),
        "full_attention": Layer(
            attention.MIXER, full, AttentionCost(full), layer_tensors(model, attended, behind, behind=True), behind=True
        ),
    }
    return [kinds[kind] for kind in model.kinds]


FAMILY = Family("olmo_hybrid", OlmoHybridConfig, layers, FORMAT, f"{__name__}.reference:logits")
