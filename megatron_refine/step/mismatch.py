"""The engine's log-probabilities against the trainer's, of the same rollout tokens.

An engine computes in kernels of its own, so it draws from mu where the loss wants draws from the trainer's pi_old. The
importance weights pi_old / mu make up for that; truncated, they keep their variance bounded (IMPALA, arXiv 1802.01561,
section 4.1). What is too far off to be rounding teaches nothing, or stops the run.
"""

import math

import torch
from torch import Tensor

from megatron_refine.errors import MismatchError


@torch.no_grad()
def logprob_gap(old_logprobs: Tensor, engine_logprobs: Tensor) -> Tensor:
    """|trainer's - engine's| in nats, infinite where the engine's is not finite: [B, c, n, k] twice -> [B, c, n, k].

    NaN where the trainer's is NaN: its own failure, whatever the engine says. The loss is NaN too, and the optimizer
    skips the step.
    """
    lost = ~engine_logprobs.isfinite() & ~old_logprobs.isnan()
    return (old_logprobs - engine_logprobs).abs().masked_fill(lost, math.inf)


@torch.no_grad()
def token_weights(old_logprobs: Tensor, engine_logprobs: Tensor, mask_gap: float, importance_cap: float) -> Tensor:
    """What each rollout token counts in the policy loss: [B, c, n, k] twice -> [B, c, n, k], no gradient.

    0 for all tokens of a rollout with a gap above `mask_gap`; else min(pi_old / mu, importance_cap), 1 where the cap
    is 0. A weight is finite whatever the log-probabilities are.
    """
    gap = logprob_gap(old_logprobs, engine_logprobs)
    trusted = (gap <= mask_gap).all(-1, keepdim=True)  # not where a gap is NaN
    if not importance_cap:
        return trusted.to(old_logprobs.dtype).expand_as(old_logprobs)
    return torch.where(trusted, (old_logprobs - engine_logprobs).exp().clamp(max=importance_cap), 0.0)


def check_gap(mean: float, largest: float, stop_gap: float, step: int) -> None:
    """Raises MismatchError where a step's mean gap exceeds `stop_gap`. The mean must be that of all ranks.

    A NaN passes: see `logprob_gap`.
    """
    if mean > stop_gap:
        raise MismatchError(
            f"step {step}: log-probabilities of the engine and the trainer differ by {mean:.2g} nats on average "
            f"(at most {largest:.2g}), above engine.stop_gap={stop_gap:g}; the checkpoints are intact: check "
            "that the engine serves this model's weights at its precision, or raise engine.stop_gap, then run the same "
            "command again"
        )
