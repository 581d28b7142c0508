"""Log-probabilities of given tokens at any layout, without gradient."""

from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_refine.trainer import forward
from megatron_refine.trainer.parallel import Ranks, broadcast_from_last_stage


@torch.no_grad()
def score_tokens(model: nn.Module, tokens: Tensor, ranks: Ranks) -> Tensor:
    """tokens [B, T] -> log-probability of each from the second on [B, T-1], on every rank."""

    def forward_step(iterator: Any, model: Any) -> Any:
        return forward.ntp_pass(model, next(iterator)), _keep

    sequence_parallel = model.config.sequence_parallel  # type: ignore[union-attr]
    length = tokens.shape[1]
    collected = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter([tokens]),
        model=model,
        num_microbatches=1,
        seq_length=length + (-length % ranks.tp if sequence_parallel else 0),
        micro_batch_size=len(tokens),
        forward_only=True,
    )
    shape = (len(tokens), length - 1)
    local = collected[0] if collected else torch.zeros(shape, dtype=torch.float64, device=tokens.device)
    return broadcast_from_last_stage(local, ranks)


def _keep(output: Any) -> tuple[Tensor, Tensor]:
    """As a loss function of Megatron's schedule: nothing to differentiate, and what is kept."""
    logprobs = output["logprobs"].double()
    return logprobs.new_zeros(()), logprobs
