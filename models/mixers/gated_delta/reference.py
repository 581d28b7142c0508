"""A Gated DeltaNet mixer evaluated slowly (arXiv 2412.06464; flash-linear-attention's layer, and its names)."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from megatron_refine.kernels.delta_rule.reference import recurrent_delta_rule
from megatron_refine.models.common.reference import Weights, causal_conv, rms_norm, unit


def mixer(model: Any, weights: Weights, prefix: str, x: Tensor) -> Tensor:
    """Mix rows x [B, T, hidden]; names begin with `prefix`. model: a `GatedDelta`, or what has its fields."""

    def project(part: str) -> Tensor:
        return x @ weights[f"{prefix}{part}_proj.weight"].T

    heads = {"q": model.num_heads, "k": model.num_heads, "v": model.value_heads}
    q, k, v = (
        causal_conv(project(part), weights[f"{prefix}{part}_conv1d.weight"]).unflatten(-1, (count, -1))
        for part, count in heads.items()
    )
    group = model.value_heads // model.num_heads  # value heads that share a key head
    q, k = (unit(z).repeat_interleave(group, -2) for z in (q, k))
    g = -weights[prefix + "A_log"].exp() * F.softplus(project("a") + weights[prefix + "dt_bias"])
    beta = project("b").sigmoid() * (2 if model.allow_neg_eigval else 1)
    o, _ = recurrent_delta_rule(q, k, v, beta, g)
    o = rms_norm(o, weights[prefix + "o_norm.weight"], model.norm_eps)
    if model.use_gate:
        o = o * F.silu(project("g").unflatten(-1, (model.value_heads, -1)))
    return o.flatten(-2) @ weights[prefix + "o_proj.weight"].T
