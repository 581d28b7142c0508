"""What branches read from the prefix that they share, on a GPU: FlexAttention, which skips the blocks no row sees."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention


def gpu_prefix_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """q [R, H, d], k, v [T, G, d], starts [R]: row i sees the first starts[i] keys -> [R, H, d], log-sum-exp [R, H]."""
    return flex_prefix_attention(q, k, v, starts, _compiled())


def flex_prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, attend: Callable[..., Any] = flex_attention
) -> tuple[Tensor, Tensor]:
    """The same; `attend` is torch's function, compiled or not. Uncompiled it holds all scores: for tests alone."""

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key < starts[query]

    mask = create_block_mask(visible, None, None, len(q), len(k), device=str(q.device))
    heads = (x.transpose(0, 1)[None] for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out, aux = attend(*heads, block_mask=mask, enable_gqa=grouped, return_aux=AuxRequest(lse=True))
    return out[0].transpose(0, 1), aux.lse[0].transpose(0, 1)


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)
