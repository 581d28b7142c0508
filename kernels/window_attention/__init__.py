"""Softmax attention over a sliding window: of a stream, and of branches that continue it."""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_refine.platform.hardware import on_gpu


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """A token sees itself and the window - 1 before it. q, k, v [N, T, h, d] -> [N, T, h, d].

    In blocks of a window, each against itself and the block before, by torch's fused attention: memory and work are
    linear in T. On a GPU a kernel that knows of windows does it.
    """
    length = q.shape[1]
    if length <= window:
        return _attend(q, k, v, None)
    if on_gpu(q) and q.dtype != torch.float64:
        from megatron_refine.kernels.window_attention.gpu import gpu_window_attention

        return gpu_window_attention(q, k, v, window)
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, -length % window)).unflatten(1, (-1, window)) for x in (q, k, v))
    first = _attend(q[:, 0], k[:, 0], v[:, 0], None)
    keys, values = (torch.cat([x[:, :-1], x[:, 1:]], 2).flatten(0, 1) for x in (k, v))
    ago = torch.arange(window, device=q.device)[:, None] - torch.arange(-window, window, device=q.device)
    later = _attend(q[:, 1:].flatten(0, 1), keys, values, (ago >= 0) & (ago < window))
    return torch.cat([first, later.unflatten(0, (q.shape[0], -1)).flatten(1, 2)], 1)[:, :length]


def used(gpu: bool) -> str:
    """Say what computes it on this machine."""
    flash = importlib.util.find_spec("flash_attn") is not None
    return f"window attention: {('flash-attn' if flash else 'FlexAttention') if gpu else 'torch'}"


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """[N, i, h, d], [N, j, h, d] twice -> [N, i, h, d]; no mask means causal."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None).transpose(1, 2)


def branch_attention(
    q: Tensor, prefix: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], positions: Tensor, window: int
) -> Tensor:
    """Rows of branches against the main rows before them and their own.

    Args: q [N, m, h, d], the last m of a branch's t own rows; prefix k, v [P, L, h, d], the L main rows before each
    branch's first own row, where P divides N: each serves N/P consecutive branches; own k, v [N, t, h, d]; positions
    [P], main tokens before the branch: fewer than L where the prefix is padded at its front. Returns: [N, m, h, d].
    """
    keys, rows, total = prefix[0].shape[1], q.shape[1], own[0].shape[1]
    shared, scale = q.shape[0] // prefix[0].shape[0], q.shape[-1] ** -0.5
    place = torch.arange(total - rows, total, device=q.device)  # of the queries among the own rows
    folded = q.unflatten(0, (-1, shared)).flatten(1, 2).transpose(1, 2)  # [P, h, n m, d]
    far = (folded @ prefix[0].permute(0, 2, 3, 1)).unflatten(2, (shared, rows)) * scale  # [P, h, n, m, L]
    ago = place[:, None] + keys - torch.arange(keys, device=q.device)  # [m, L]
    real = torch.arange(keys, device=q.device) >= keys - positions[:, None]  # [P, L]
    far = far.masked_fill(~((ago < window) & real[:, None])[:, None, None], -torch.inf)
    near = (q.transpose(1, 2) @ own[0].permute(0, 2, 3, 1)) * scale  # [N, h, m, t]
    ago = place[:, None] - torch.arange(total, device=q.device)
    near = near.masked_fill((ago < 0) | (ago >= window), -torch.inf)
    scores = torch.cat([far.transpose(1, 2).flatten(0, 1), near], -1).softmax(-1)
    from_far, from_near = scores.split([keys, total], -1)
    folded = from_far.unflatten(0, (-1, shared)).transpose(1, 2).flatten(2, 3)  # [P, h, n m, L]
    read = (folded @ prefix[1].transpose(1, 2)).unflatten(2, (shared, rows)).permute(0, 2, 3, 1, 4).flatten(0, 1)
    return read + (from_near @ own[1].transpose(1, 2)).transpose(1, 2)
