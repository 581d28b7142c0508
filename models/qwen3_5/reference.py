"""Qwen3.5 evaluated from tensors in Hugging Face's format: slow, obvious, in plain torch (transformers 5.24)."""

from torch import Tensor

from megatron_refine.models.common.qwen import reference as qwen
from megatron_refine.models.common.qwen.config import QwenConfig
from megatron_refine.models.common.reference import Weights
from megatron_refine.models.qwen3_5.config import Qwen35Config


def logits(model: Qwen35Config, weights: Weights, tokens: Tensor) -> Tensor:
    """tokens [B, T] -> logits [B, T, vocab]."""
    return qwen.logits(model, weights, tokens, _project)


def _project(model: QwenConfig, weights: Weights, prefix: str, x: Tensor) -> list[Tensor]:
    return [x @ weights[f"{prefix}in_proj_{name}.weight"].T for name in ("qkv", "z", "b", "a")]
