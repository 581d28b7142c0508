"""What a rollout earns: how close it is to the text that really follows (arXiv 2602.16704, section 3.2).

A reward of your own: `refine.reward=package.module:function` with the signature of these.
"""

import torch.nn.functional as F
from torch import Tensor

from megatron_refine.records import Reward


def cosine(tokens: Tensor, truth: Tensor, h_pred: Tensor, h_true: Tensor) -> Tensor:
    """Mean cosine similarity of the hidden states after each rollout token and after each true token.

    tokens [B, c, n, k], truth [B, c, k], h_pred [B, c, n, k, h], h_true [B, c, k, h] -> [B, c, n] in [-1, 1].
    """
    return F.cosine_similarity(h_pred.float(), h_true.float()[:, :, None], dim=-1).mean(-1)


def binary(tokens: Tensor, truth: Tensor, h_pred: Tensor, h_true: Tensor) -> Tensor:
    """Share of rollout tokens that equal the true token at their place: in [0, 1]. Shapes as for `cosine`."""
    return (tokens == truth[:, :, None]).float().mean(-1)


def hybrid(tokens: Tensor, truth: Tensor, h_pred: Tensor, h_true: Tensor) -> Tensor:
    """cosine + binary."""
    return cosine(tokens, truth, h_pred, h_true) + binary(tokens, truth, h_pred, h_true)


REWARDS: dict[str, Reward] = {"cosine": cosine, "binary": binary, "hybrid": hybrid}
