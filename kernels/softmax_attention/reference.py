"""Softmax attention with the whole matrix of scores and every head's keys: slow, obvious."""

import torch
from torch import Tensor

from megatron_refine.kernels.places import Places


def full_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [N, m, H, d], the last m of T tokens, k, v [N, T, G, d] -> [N, m, H, d]; a token sees itself and those before.

    Query head h reads key head h // (H / G).
    """
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("nihd,njhd->nhij", q, k) * q.shape[-1] ** -0.5
    place = torch.arange(k.shape[1])
    scores = scores.masked_fill(place > place[-q.shape[1] :, None], -torch.inf)
    return torch.einsum("nhij,njhd->nihd", scores.softmax(-1), v)


def full_branch_attention(
    q: Tensor, prefix: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], places: Places
) -> Tensor:
    """As `branch_attention`: each branch with a copy of its prefix in front of its own rows."""
    each, found = len(q) // len(places.on_host), []
    for branch, rows in enumerate(q):
        sequence, tokens = places.on_host[branch // each]
        k, v = (torch.cat([x[sequence, :tokens], y[branch]]) for x, y in zip(prefix, own, strict=True))
        found.append(full_attention(rows[None], k[None], v[None])[0])
    return torch.stack(found)
