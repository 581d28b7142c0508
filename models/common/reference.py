"""A model evaluated from tensors in Hugging Face's format: slow, obvious, in plain torch.

No layer, kernel or mapping of the trainer is used, so that agreement with the trainer's model means something: what
`convert_checkpoint --verify` compares. A family's `reference.py` adds its mixer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Any  # weights[name] -> Tensor, as a dict has or as a file is read
Mixer = Callable[[Any, Weights, str, Tensor], Tensor]
"""mixer(model, weights, prefix of its names, x [B, T, hidden]) -> [B, T, hidden]."""


def decoder_logits(model: Any, weights: Weights, tokens: Tensor, mixers: Mixer | Sequence[Mixer]) -> Tensor:
    """tokens [B, T] -> logits [B, T, vocab]: norm and mixer, norm and gated MLP, each with a residual.

    mixers: of all layers, or of each.
    """
    each = [mixers] * model.num_layers if callable(mixers) else mixers
    embeddings = weights["model.embeddings.weight"]
    x = embeddings[tokens]
    for layer, mixer in enumerate(each):
        prefix = f"model.layers.{layer}."
        x = x + mixer(
            model, weights, prefix + "attn.", rms_norm(x, weights[prefix + "attn_norm.weight"], model.norm_eps)
        )
        x = x + gated_mlp(weights, prefix + "mlp.", rms_norm(x, weights[prefix + "mlp_norm.weight"], model.norm_eps))
    x = rms_norm(x, weights["model.norm.weight"], model.norm_eps)
    return x @ (embeddings if model.tie_embeddings else weights["lm_head.weight"]).T


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean x^2 + eps) * weight over the last dimension."""
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum x^2 + eps) over the last dimension."""
    return x / (x.pow(2).sum(-1, keepdim=True) + eps).sqrt()


def turned(x: Tensor, dims: int, theta: float) -> Tensor:
    """RoPE on the first `dims` dimensions of heads [B, T, heads, d], their two halves paired."""
    half = dims // 2
    angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * theta ** (
        -torch.arange(half, dtype=torch.float64) / half
    )
    cos, sin = (f(angles).to(x)[:, None] for f in (torch.cos, torch.sin))
    a, b, rest = x.split([half, half, x.shape[-1] - dims], -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def causal_conv(x: Tensor, weight: Tensor) -> Tensor:
    """SiLU of a causal depthwise convolution: x [B, T, D], weight [D, 1, W] -> [B, T, D]."""
    rows = F.pad(x.transpose(1, 2), (weight.shape[-1] - 1, 0))
    return F.silu(F.conv1d(rows, weight, groups=x.shape[-1])).transpose(1, 2)


def cast_weights(weights: Weights, *dtypes: torch.dtype) -> Weights:
    """The same tensors, cast to each of `dtypes` in turn when read."""
    return _Cast(weights, dtypes)


class _Cast:
    def __init__(self, weights: Weights, dtypes: tuple[torch.dtype, ...]):
        self.weights, self.dtypes = weights, dtypes

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.weights[name]
        for dtype in self.dtypes:
            tensor = tensor.to(dtype)
        return tensor


def gated_mlp(weights: Weights, prefix: str, x: Tensor) -> Tensor:
    """down(SiLU(gate x) * up x), by names that begin with `prefix`."""
    gate, up = x @ weights[prefix + "gate_proj.weight"].T, x @ weights[prefix + "up_proj.weight"].T
    return (F.silu(gate) * up) @ weights[prefix + "down_proj.weight"].T
