"""Sliding-window attention with the whole matrix of scores: slow, obvious."""

import torch
from torch import Tensor


def full_window_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """A token sees itself and the window - 1 before it. q, k, v [N, T, h, d] -> [N, T, h, d]."""
    scores = torch.einsum("nihd,njhd->nhij", q, k) * q.shape[-1] ** -0.5
    ago = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])
    scores = scores.masked_fill((ago < 0) | (ago >= window), -torch.inf)
    return torch.einsum("nhij,njhd->nihd", scores.softmax(-1), v)
