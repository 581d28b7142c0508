"""Qwen3-Next evaluated from tensors in Hugging Face's format: slow, obvious, in plain torch (transformers 5.24)."""

import torch
from torch import Tensor

from megatron_refine.models.common.qwen import reference as qwen
from megatron_refine.models.common.qwen.config import QwenConfig
from megatron_refine.models.common.reference import Weights
from megatron_refine.models.qwen3_next.config import Qwen3NextConfig


def logits(model: Qwen3NextConfig, weights: Weights, tokens: Tensor) -> Tensor:
    """tokens [B, T] -> logits [B, T, vocab]."""
    return qwen.logits(model, weights, tokens, _project)


def _project(model: QwenConfig, weights: Weights, prefix: str, x: Tensor) -> list[Tensor]:
    """Rows of in_proj_qkvz lie key head by key head, in each q | k | v | z; those of in_proj_ba too, in each b | a."""
    heads, key = model.linear_num_key_heads, model.linear_key_head_dim
    values = model.linear_num_value_heads // heads  # of a key head
    wide = values * model.linear_value_head_dim
    mixed = (x @ weights[prefix + "in_proj_qkvz.weight"].T).unflatten(-1, (heads, -1))
    q, k, v, z = (part.flatten(-2) for part in mixed.split([key, key, wide, wide], -1))
    both = (x @ weights[prefix + "in_proj_ba.weight"].T).unflatten(-1, (heads, -1))
    b, a = (part.flatten(-2) for part in both.split([values, values], -1))
    return [torch.cat([q, k, v], -1), z, b, a]
