"""The loss: next-token cross-entropy plus the clipped policy loss of the rollouts.

Clip: PPO, arXiv 1707.06347. Dual clip: arXiv 1912.09729.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class PolicyTerms:
    """Terms of every rollout token; the step reports sums over them."""

    loss: Tensor  # in the graph
    clipped: Tensor  # 1 where the clip is active, no gradient
    ratio: Tensor  # new / old probability, no gradient


def policy_terms(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float
) -> PolicyTerms:
    """max(-A r, -A clip(r, 1 - low, 1 + high)), and at most -dual_clip A where A < 0.

    logprobs, old_logprobs [..., k]; advantages [...], shared by the k tokens of a rollout.
    """
    advantage = advantages[..., None]
    ratio = (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    plain, clipped = -advantage * ratio, -advantage * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(plain, clipped)
    bound = -dual_clip * advantage
    loss = torch.where(advantage < 0, torch.minimum(loss, bound), loss)
    active = (clipped > plain) | ((advantage < 0) & (torch.maximum(plain, clipped) > bound))
    return PolicyTerms(loss, active.to(ratio.dtype), ratio.detach())


def next_token_sums(logprobs: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of -log-probability over real targets, and their number: logprobs [B, T-1], lengths [B] -> scalars."""
    real = torch.arange(1, logprobs.shape[1] + 1, device=logprobs.device) < lengths[:, None]
    return -(logprobs * real).sum(), real.sum()
