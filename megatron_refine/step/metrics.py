"""Sums over micro-batches and ranks, as the means that a step reports."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_refine.records import Experience
from megatron_refine.trainer.parallel import sum_over


def rollout_sums(
    experience: Experience, rewards: Tensor, entropy: Tensor, lengths: Tensor, zero_variance: Tensor, gap: Tensor
) -> Tensor:
    """What `rollout_metrics` averages, of one micro-batch; unusable sequences count for nothing. Returns fp64 [12].

    rewards [B, c, n]; entropy [B, T]; lengths [B]; zero_variance [B]; gap [B, c, n, k].
    """
    use = experience.usable
    rewards, gap, weights = rewards[use].double(), gap[use].double(), experience.weights[use].double()
    masked = (weights == 0).all(-1)
    real = torch.arange(entropy.shape[1], device=entropy.device) < lengths[:, None]
    return torch.stack(
        [
            rewards.sum(), rewards.square().sum(), rewards.new_tensor(rewards.numel()),
            (entropy * real).sum().double(), real.sum().double(),
            zero_variance[use].sum().double(), use.sum().double(),
            gap.sum(), gap.new_tensor(gap.numel()),
            masked.sum().double(), weights.sum(), (~masked).sum().double() * weights.shape[-1],
        ]
    )  # fmt: skip


def rollout_metrics(sums: list[Tensor], largest_gap: Tensor, weight_version: int, dp_group: Any) -> dict[str, float]:
    """Means over all micro-batches and data-parallel ranks."""
    total = sum_over(torch.stack(sums).sum(0), dp_group)
    largest = largest_gap.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=dp_group)
    reward, square, rewards, entropy, tokens, zero, sequences, gap, gaps, masked, weight, weights = total.tolist()
    mean = reward / max(rewards, 1)
    return {
        "rollout/reward_mean": mean,
        "rollout/reward_std": max(square / max(rewards, 1) - mean**2, 0.0) ** 0.5,
        "rollout/entropy_mean": entropy / max(tokens, 1),
        "rollout/zero_variance_groups": zero / max(sequences, 1),
        "rollout/logprob_gap_mean": gap / max(gaps, 1),
        "rollout/logprob_gap_max": float(largest),
        "rollout/masked_fraction": masked / max(rewards, 1),
        "rollout/importance_mean": weight / max(weights, 1),  # over the tokens of rollouts that are not masked
        "rollout/weight_version": weight_version,
    }
