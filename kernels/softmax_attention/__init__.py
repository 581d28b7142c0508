"""Softmax attention with grouped key heads: of a stream, and of branches that start inside it and share its keys."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_refine.kernels.fused import fused
from megatron_refine.kernels.places import Places, Run
from megatron_refine.platform.hardware import on_gpu

Part = tuple[Tensor, Tensor]
"""What rows read from some of their keys, [N, R, H, d], and the log-sum-exp of their scores there, [N, R, H], in at
least fp32."""


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A token sees itself and those before. q [N, T, H, d], k, v [N, T, G, d] -> [N, T, H, d].

    Query head h reads key head h // (H / G). torch's fused attention keeps no scores: memory is linear in T. Its GPU
    kernel that knows of groups is one of half precision; otherwise the query heads of a group take turns.
    """
    if q.shape[2] != k.shape[2] and on_gpu(q) and q.dtype not in (torch.bfloat16, torch.float16):
        return in_turns(q, k, v)
    return _causal(q, k, v)


def used(costs: Sequence[Any], gpu: bool) -> str:
    """Say what computes it on this machine."""
    return "softmax attention: torch" + (", FlexAttention for branches" if gpu else "")


def in_turns(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `causal_attention`, with one query head of each group at a time: no kernel need know of groups."""
    turns = q.unflatten(2, (k.shape[2], -1)).unbind(3)
    return torch.stack([_causal(turn, k, v) for turn in turns], 3).flatten(2, 3)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)


def branch_attention(q: Tensor, prefix: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], places: Places) -> Tensor:
    """Rows of branches see the tokens of their sequence before the branch, and their branch's rows up to themselves.

    Args: q [N, m, H, d], the last m of a branch's t rows; prefix k, v [B, T, G, d], of whole sequences; own k, v
    [N, t, G, d]; P places, each where N/P consecutive branches start, none before a sequence's first token. Returns:
    [N, m, H, d].

    The prefix and the own rows are two parts, merged by their log-sum-exps (arXiv 1805.02867): so all branches of a
    sequence read its keys where they lie. One softmax over [T | own rows] would need those side by side: a copy of all
    keys in each layer's graph, and again for each decoded token.
    """
    runs = places.runs(len(q) // len(places.on_host) * q.shape[1])
    parts = q.flatten(0, 1).split([len(run.before) for run in runs])
    keys, values = (x.unbind(0) for x in prefix)
    read = [_prefix(x, keys[run.sequence], values[run.sequence], run) for x, run in zip(parts, runs, strict=True)]
    far, weight = (torch.cat(x) if len(read) > 1 else x[0] for x in zip(*read, strict=True))
    near = attend(q, *own, _triangle(own[0].shape[1], q.shape[1], q.device))
    return merged(far.view_as(q), weight.view(q.shape[:3]), *near).to(q.dtype)


def _prefix(q: Tensor, k: Tensor, v: Tensor, run: Run) -> Part:
    """What rows [R, H, d] of one sequence's branches read from the tokens before these, k, v [T, G, d]: [R, H, d],
    [R, H]."""
    if on_gpu(q) and q.dtype != torch.float64:
        from megatron_refine.kernels.softmax_attention.gpu import gpu_prefix_attention

        return gpu_prefix_attention(q, k, v, run)
    return torch_prefix_attention(q, k, v, run)


def torch_prefix_attention(q: Tensor, k: Tensor, v: Tensor, run: Run) -> Part:
    """As `_prefix`. The scores exist for one sequence at a time, and again in the backward pass."""

    def attended(q: Tensor, k: Tensor, v: Tensor) -> Part:
        out, weight = attend(q[None], k[None], v[None], torch.arange(len(k), device=q.device) < run.before[:, None])
        return out[0], weight[0]

    given = q, k[: run.most], v[: run.most]
    if not torch.is_grad_enabled():
        return attended(*given)
    part: Part = checkpoint(attended, *given, use_reentrant=False, preserve_rng_state=False)
    return part


@functools.lru_cache(maxsize=8)
def _triangle(total: int, rows: int, device: torch.device) -> Tensor:
    """[rows, total]: whether the last `rows` of `total` rows see each of them."""
    return torch.ones(rows, total, dtype=torch.bool, device=device).tril(total - rows)


@fused
def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Part:
    """q [N, R, H, d], k, v [N, L, G, d], visible [R, L], at least one key a row -> the part of these keys."""
    high = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(high).unflatten(2, (k.shape[2], -1)) * q.shape[-1] ** -0.5
    scores = torch.einsum("nrgjd,nlgd->ngjrl", grouped, k.to(high)).masked_fill(~visible, -torch.inf)
    weight = scores.logsumexp(-1, keepdim=True)
    out = torch.einsum("ngjrl,nlgd->nrgjd", (scores - weight).exp(), v.to(high))
    return out.flatten(2, 3), weight.squeeze(-1).permute(0, 3, 1, 2).flatten(2)


@fused
def merged(far: Tensor, far_weight: Tensor, near: Tensor, near_weight: Tensor) -> Tensor:
    """What the keys of two parts together give, [N, R, H, d]."""
    total = torch.logaddexp(far_weight, near_weight)
    return far * (far_weight - total).exp()[..., None] + near * (near_weight - total).exp()[..., None]
