"""Sums over micro-batches and ranks, as the means that a step reports."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_refine.records import Experience
from megatron_refine.trainer.parallel import sum_over


def rollout_sums(
    experience: Experience, rewards: Tensor, kinds: Tensor, entropy: Tensor, lengths: Tensor, zero_variance: Tensor,
    gap: Tensor,
) -> Tensor:  # fmt: skip
    """What `rollout_metrics` averages, of one micro-batch; unusable sequences count for nothing. Returns fp64 [14].

    rewards [B, c, n]; kinds [B, c, n, 2], cosine and binary; entropy [B, T]; lengths [B]; zero_variance [B];
    gap [B, c, n, k].
    """
    use = experience.usable

    def used(x: Tensor) -> Tensor:
        """Zeros where a sequence is unusable: picking the others would wait for their number."""
        return torch.where(use.view(-1, *[1] * (x.dim() - 1)), x.double(), 0.0)

    sequences = use.sum().double()
    rewards, gap, weights = used(rewards), used(gap), used(experience.weights)
    cosine, binary = used(kinds).flatten(0, -2).sum(0)
    masked = (experience.weights == 0).all(-1) & use[:, None, None]
    real = torch.arange(entropy.shape[1], device=entropy.device) < lengths[:, None]
    rollouts = sequences * rewards[0].numel()
    return torch.stack(
        [
            rewards.sum(), rewards.square().sum(), cosine, binary, rollouts,
            (entropy * real).sum().double(), real.sum().double(),
            used(zero_variance).sum(), sequences,
            gap.sum(), sequences * gap[0].numel(),
            masked.sum().double(), weights.sum(), (rollouts - masked.sum()) * weights.shape[-1],
        ]
    )  # fmt: skip


def rollout_metrics(sums: list[Tensor], largest_gap: Tensor, weight_version: int, dp_group: Any) -> dict[str, float]:
    """Means over all micro-batches and data-parallel ranks."""
    total = sum_over(torch.stack(sums).sum(0), dp_group)
    largest = largest_gap.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=dp_group)
    found = torch.cat([total, largest.double()[None]]).tolist()  # once
    reward, square, cosine, binary, rewards, entropy, tokens, zero, sequences, *rest = found
    gap, gaps, masked, weight, weights, most = rest
    mean = reward / max(rewards, 1)
    return {
        "rollout/reward_mean": mean,
        "rollout/reward_std": max(square / max(rewards, 1) - mean**2, 0.0) ** 0.5,
        # what the built-in rewards would give, whichever is configured
        "rollout/cosine_mean": cosine / max(rewards, 1),
        "rollout/binary_mean": binary / max(rewards, 1),
        "rollout/hybrid_mean": (cosine + binary) / max(rewards, 1),
        "rollout/entropy_mean": entropy / max(tokens, 1),
        "rollout/zero_variance_groups": zero / max(sequences, 1),
        "rollout/logprob_gap_mean": gap / max(gaps, 1),
        "rollout/logprob_gap_max": most,
        "rollout/masked_fraction": masked / max(rewards, 1),
        "rollout/importance_mean": weight / max(weights, 1),  # over the tokens of rollouts that are not masked
        "rollout/weight_version": weight_version,
    }
