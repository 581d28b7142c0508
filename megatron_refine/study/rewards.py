"""The control of the study: rewards that say nothing of their rollout."""

import torch
from torch import Tensor

from megatron_refine.step.reward import binary


def shuffled(tokens: Tensor, truth: Tensor, h_pred: Tensor, h_true: Tensor) -> Tensor:
    """Return the binary rewards, dealt anew to the rollouts of each position: [B, c, n].

    Each group keeps its rewards, and so their mean and spread: what is lost is which rollout earned which.
    """
    rewards = binary(tokens, truth, h_pred, h_true)
    generator = torch.Generator().manual_seed(int(tokens.sum()))
    order = torch.rand(rewards.shape, generator=generator).argsort(-1).to(rewards.device)
    return rewards.gather(-1, order)
