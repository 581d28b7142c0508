"""GRPO's group-relative advantage (arXiv 2402.03300, section 4.1; groups as in REFINE's official code)."""

from torch import Tensor


def advantages(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """(R - mean) / (std + eps) over a group, std unbiased: [B, c, n] -> [B, c, n].

    With one rollout a position (n = 1) the group is the c positions of a sequence; with more, the n rollouts of a
    position. A group of one keeps its reward (mean 0, std 1).
    """
    group = rewards.flatten(1) if rewards.shape[2] == 1 else rewards
    if group.shape[-1] == 1:
        return rewards / (1 + eps)
    centred = group - group.mean(-1, keepdim=True)
    return (centred / (group.std(-1, keepdim=True) + eps)).view(rewards.shape)


def zero_variance_groups(rewards: Tensor) -> Tensor:
    """Groups whose rewards are all equal, per sequence: they teach nothing. [B, c, n] -> [B] share in [0, 1]."""
    group = rewards.flatten(1)[:, None] if rewards.shape[2] == 1 else rewards
    return (group == group[..., :1]).all(-1).float().mean(-1)
