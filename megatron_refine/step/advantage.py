"""GRPO's group-relative advantage (arXiv 2402.03300, section 4.1; groups as in REFINE's official code)."""

import torch
from torch import Tensor

# Rewards are computed in fp32. The cosines of rollouts that all repeat the text are 1, up to two such steps apart; with
# eps = 1e-6 their rounding would still give advantages of 0.2. Any wider spread is taken for real.
ROUNDING = 4 * torch.finfo(torch.float32).eps


def advantages(rewards: Tensor, eps: float = 1e-6, scaled: bool = True, group: str = "auto") -> Tensor:
    """(R - mean) / (std + eps) over a group, std unbiased; exactly 0 where `_equal`: [B, c, n] -> [B, c, n].

    Without `scaled`, R - mean (Dr. GRPO, arXiv 2503.20783). `group` is `refine.group`. A group of one keeps its reward
    (mean 0, std 1).
    """
    members = _groups(rewards, group)
    if members.shape[-1] == 1:
        return rewards / (1 + eps) if scaled else rewards
    found = members - members.mean(-1, keepdim=True)
    if scaled:
        found = found / (members.std(-1, keepdim=True) + eps)
    return found.masked_fill(_equal(members)[..., None], 0).view(rewards.shape)


def zero_variance_groups(rewards: Tensor, group: str = "auto") -> Tensor:
    """Share of groups whose advantages are 0 for want of a spread, per sequence: [B, c, n] -> [B] in [0, 1]."""
    return _equal(_groups(rewards, group)).float().mean(-1)


def _groups(rewards: Tensor, group: str) -> Tensor:
    """[B, c, n] -> [B, groups, members]: the rollouts of a sequence, or of a position. auto: of a position if n > 1."""
    whole = rewards.shape[2] == 1 if group == "auto" else group == "sequence"
    return rewards.flatten(1)[:, None] if whole else rewards


def _equal(group: Tensor) -> Tensor:
    """Groups of several whose rewards differ by no more than the rounding of the largest: [B, g, m] -> [B, g] bool.

    One with a reward that is not finite is none, so that its advantages are nan, and the step is skipped and counted.
    """
    low, high = group.aminmax(dim=-1)
    largest = torch.maximum(low.abs(), high.abs())
    return (high - low <= ROUNDING * largest) & largest.isfinite() & (group.shape[-1] > 1)
