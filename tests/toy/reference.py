"""The toy evaluated slowly."""

from torch import Tensor

from megatron_refine.models.common.reference import Weights, decoder_logits
from megatron_refine.models.delta_net.reference import mixer as plain_mixer
from megatron_refine.models.mixers.gated_delta.reference import mixer as gated_mixer
from tests.toy import ToyConfig


def logits(model: ToyConfig, weights: Weights, tokens: Tensor) -> Tensor:
    """tokens [B, T] -> logits [B, T, vocab]."""
    plain, gated = model.kinds()

    def first(_: object, *rest: object) -> Tensor:
        return plain_mixer(plain, *rest)  # type: ignore[arg-type]

    def second(_: object, *rest: object) -> Tensor:
        return gated_mixer(gated, *rest)  # type: ignore[arg-type]

    return decoder_logits(model, weights, tokens, [(first, second)[i % 2] for i in range(model.num_layers)])
