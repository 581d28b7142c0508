"""Gated DeltaNet evaluated from tensors in Hugging Face's format (arXiv 2412.06464; flash-linear-attention's layer)."""

from torch import Tensor

from megatron_refine.models.common.reference import Weights, decoder_logits
from megatron_refine.models.gated_delta_net.config import GatedDeltaNetConfig
from megatron_refine.models.mixers.gated_delta.reference import mixer


def logits(model: GatedDeltaNetConfig, weights: Weights, tokens: Tensor) -> Tensor:
    """tokens [B, T] -> logits [B, T, vocab]."""
    return decoder_logits(model, weights, tokens, mixer)
