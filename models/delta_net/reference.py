"""DeltaNet evaluated from tensors in Hugging Face's format (arXiv 2406.06484; flash-linear-attention's layer)."""

from torch import Tensor

from megatron_refine.kernels.delta_rule.reference import recurrent_delta_rule
from megatron_refine.models.common.reference import Weights, causal_conv, decoder_logits, rms_norm, unit
from megatron_refine.models.delta_net.config import DeltaNetConfig


def logits(model: DeltaNetConfig, weights: Weights, tokens: Tensor) -> Tensor:
    """tokens [B, T] -> logits [B, T, vocab]."""
    return decoder_logits(model, weights, tokens, mixer)


def mixer(model: DeltaNetConfig, weights: Weights, prefix: str, x: Tensor) -> Tensor:
    """Mix normed rows x [B, T, hidden]; the layer's names begin with `prefix`."""
    q, k, v = (
        causal_conv(x @ weights[f"{prefix}{part}_proj.weight"].T, weights[f"{prefix}{part}_conv1d.weight"]).unflatten(
            -1, (model.num_heads, -1)
        )
        for part in "qkv"
    )
    beta = (x @ weights[prefix + "b_proj.weight"].T).sigmoid() * (2 if model.allow_neg_eigval else 1)
    o, _ = recurrent_delta_rule(unit(q), unit(k), v, beta)
    o = rms_norm(o, weights[prefix + "o_norm.weight"], model.norm_eps)
    return o.flatten(-2) @ weights[prefix + "o_proj.weight"].T
