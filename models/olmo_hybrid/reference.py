"""Olmo-Hybrid evaluated from tensors in Hugging Face's format: slow, obvious, in plain torch (transformers 5.24)."""

import torch.nn.functional as F
from torch import Tensor

from megatron_refine.kernels.delta_rule.reference import recurrent_delta_rule
from megatron_refine.kernels.softmax_attention.reference import full_attention
from megatron_refine.models.common.reference import Weights, causal_conv, gated_mlp, rms_norm, turned, unit
from megatron_refine.models.olmo_hybrid import HEAD_EPS
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
            x = x + _linear(model, weights, prefix, rms_norm(x, first, eps))
            x = x + gated_mlp(weights, prefix + "mlp.", rms_norm(x, second, eps))
        else:
            x = x + rms_norm(_attention(model, weights, prefix, x), first, eps)
            x = x + rms_norm(gated_mlp(weights, prefix + "mlp.", x), second, eps)
    x = rms_norm(x, weights["model.norm.weight"], eps)
    return x @ (embeddings if model.tie_embeddings else weights["lm_head.weight"]).T


def _linear(model: OlmoHybridConfig, weights: Weights, layer: str, x: Tensor) -> Tensor:
    prefix, heads, values = layer + "linear_attn.", model.linear_num_key_heads, model.linear_num_value_heads

    def project(part: str) -> Tensor:
        return x @ weights[f"{prefix}{part}_proj.weight"].T

    q, k, v = (causal_conv(project(part), weights[f"{prefix}{part}_conv1d.weight"]) for part in "qkv")
    q, k = (unit(part.unflatten(-1, (heads, -1))).repeat_interleave(values // heads, -2) for part in (q, k))
    g = -weights[prefix + "A_log"].exp() * F.softplus(project("a") + weights[prefix + "dt_bias"])
    beta = project("b").sigmoid() * (2 if model.linear_allow_neg_eigval else 1)
    o, _ = recurrent_delta_rule(q, k, v.unflatten(-1, (values, -1)), beta, g)
    gate = project("g").unflatten(-1, (values, -1))
    return (rms_norm(o, weights[prefix + "o_norm.weight"], HEAD_EPS) * F.silu(gate)).flatten(-2) @ weights[
        prefix + "o_proj.weight"
    ].T


def _attention(model: OlmoHybridConfig, weights: Weights, layer: str, x: Tensor) -> Tensor:
    prefix = layer + "self_attn."
    q, k, v = (x @ weights[f"{prefix}{part}_proj.weight"].T for part in "qkv")
    q, k = (rms_norm(z, weights[f"{prefix}{n}_norm.weight"], model.norm_eps) for z, n in ((q, "q"), (k, "k")))
    q, k, v = (z.unflatten(-1, (-1, model.head_dim)) for z in (q, k, v))
    if model.rope_theta:
        q, k = (turned(z, model.head_dim, model.rope_theta) for z in (q, k))
    return full_attention(q, k, v).flatten(-2) @ weights[prefix + "o_proj.weight"].T
