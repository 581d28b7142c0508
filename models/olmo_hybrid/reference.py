"""Olmo-Hybrid evaluated from tensors in Hugging Face's format: slow, obvious, in plain torch (transformers 5.24)."""

from torch import Tensor

from megatron_refine.kernels.softmax_attention.reference import full_attention
from megatron_refine.models.common.reference import Weights, gated_mlp, rms_norm, turned
from megatron_refine.models.mixers.gated_delta.reference import mixer
from megatron_refine.models.olmo_hybrid.config import OlmoHybridConfig
from megatron_refine.models.olmo_hybrid.hf import NORMS


def logits(model: OlmoHybridConfig, weights: Weights, tokens: Tensor) -> Tensor:
    """tokens [B, T] -> logits [B, T, vocab]. Linear layers norm what goes in, attention layers what comes out."""
    embeddings, eps = weights["model.embed_tokens.weight"], model.norm_eps
    x = embeddings[tokens]
    for i, kind in enumerate(model.kinds):
        prefix = f"model.layers.{i}."
        first, second = (weights[f"{prefix}{name}.weight"] for name in NORMS[kind])
        if kind == "linear_attention":
            x = x + mixer(model.linear, weights, prefix + "linear_attn.", rms_norm(x, first, eps))
            x = x + gated_mlp(weights, prefix + "mlp.", rms_norm(x, second, eps))
        else:
            x = x + rms_norm(_attention(model, weights, prefix, x), first, eps)
            x = x + rms_norm(gated_mlp(weights, prefix + "mlp.", x), second, eps)
    x = rms_norm(x, weights["model.norm.weight"], eps)
    return x @ (embeddings if model.tie_embeddings else weights["lm_head.weight"]).T


def _attention(model: OlmoHybridConfig, weights: Weights, layer: str, x: Tensor) -> Tensor:
    prefix = layer + "self_attn."
    q, k, v = (x @ weights[f"{prefix}{part}_proj.weight"].T for part in "qkv")
    q, k = (rms_norm(z, weights[f"{prefix}{n}_norm.weight"], model.norm_eps) for z, n in ((q, "q"), (k, "k")))
    q, k, v = (z.unflatten(-1, (-1, model.head_dim)) for z in (q, k, v))
    if model.rope_theta:
        q, k = (turned(z, model.head_dim, model.rope_theta) for z in (q, k))
    return full_attention(q, k, v).flatten(-2) @ weights[prefix + "o_proj.weight"].T
