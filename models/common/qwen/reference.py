"""Qwen's hybrids evaluated from tensors in Hugging Face's format: slow, obvious, in plain torch (transformers 5.24)."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from megatron_refine.kernels.delta_rule.reference import recurrent_delta_rule
from megatron_refine.kernels.softmax_attention.reference import full_attention
from megatron_refine.models.common.qwen.config import QwenConfig
from megatron_refine.models.common.reference import Weights, causal_conv, gated_mlp, rms_norm, turned, unit

Project = Callable[[QwenConfig, Weights, str, Tensor], list[Tensor]]
"""project(model, weights, prefix, x) -> q|k|v rows of all heads, and gate, b and a of each value head."""


def logits(model: QwenConfig, weights: Weights, tokens: Tensor, project: Project) -> Tensor:
    """tokens [B, T] -> logits [B, T, vocab]. Norms of the residual stream and of q and k multiply by 1 + weight."""
    embeddings, eps = weights["model.embed_tokens.weight"], model.norm_eps
    x = embeddings[tokens]
    for i, kind in enumerate(model.kinds):
        prefix = f"model.layers.{i}."
        mixed = rms_norm(x, 1 + weights[prefix + "input_layernorm.weight"], eps)
        linear = kind == "linear_attention"
        x = x + (
            _linear(model, weights, prefix, mixed, project) if linear else _attention(model, weights, prefix, mixed)
        )
        normed = rms_norm(x, 1 + weights[prefix + "post_attention_layernorm.weight"], eps)
        x = x + gated_mlp(weights, prefix + "mlp.", normed)
    x = rms_norm(x, 1 + weights["model.norm.weight"], eps)
    return x @ (embeddings if model.tie_embeddings else weights["lm_head.weight"]).T


def _linear(model: QwenConfig, weights: Weights, layer: str, x: Tensor, project: Project) -> Tensor:
    prefix, heads, values = layer + "linear_attn.", model.linear_num_key_heads, model.linear_num_value_heads
    wide = heads * model.linear_key_head_dim
    rows, gate, b, a = project(model, weights, prefix, x)
    q, k, v = causal_conv(rows, weights[prefix + "conv1d.weight"]).split(
        [wide, wide, values * model.linear_value_head_dim], -1
    )
    q, k = (unit(part.unflatten(-1, (heads, -1))).repeat_interleave(values // heads, -2) for part in (q, k))
    g = -weights[prefix + "A_log"].exp() * F.softplus(a + weights[prefix + "dt_bias"])
    o, _ = recurrent_delta_rule(q, k, v.unflatten(-1, (values, -1)), b.sigmoid(), g)
    o = rms_norm(o, weights[prefix + "norm.weight"], model.norm_eps) * F.silu(gate.unflatten(-1, (values, -1)))
    return o.flatten(-2) @ weights[prefix + "out_proj.weight"].T


def _attention(model: QwenConfig, weights: Weights, layer: str, x: Tensor) -> Tensor:
    prefix, heads, keys = layer + "self_attn.", model.num_attention_heads, model.num_key_value_heads
    q, gate = (x @ weights[prefix + "q_proj.weight"].T).unflatten(-1, (heads, -1)).chunk(2, -1)
    k, v = ((x @ weights[f"{prefix}{name}_proj.weight"].T).unflatten(-1, (keys, -1)) for name in "kv")
    q, k = (rms_norm(z, 1 + weights[f"{prefix}{n}_norm.weight"], model.norm_eps) for z, n in ((q, "q"), (k, "k")))
    q, k = (turned(z, model.rotary_dims, model.rope_theta) for z in (q, k))
    read = full_attention(q, k, v) * gate.sigmoid()
    return read.flatten(-2) @ weights[prefix + "o_proj.weight"].T
