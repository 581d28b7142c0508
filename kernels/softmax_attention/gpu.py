"""What branches read from the prefix that they share, on a GPU: FlexAttention, which skips the blocks no row sees."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from megatron_refine.kernels.places import Run


def gpu_prefix_attention(q: Tensor, k: Tensor, v: Tensor, run: Run) -> tuple[Tensor, Tensor]:
    """Rows q [R, H, d] of a run, its sequence's k, v [T, G, d] -> [R, H, d], log-sum-exp [R, H]."""
    return flex_prefix_attention(q, k, v, run, _compiled())


def flex_prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, run: Run, attend: Callable[..., Any] = flex_attention
) -> tuple[Tensor, Tensor]:
    """The same; `attend` is torch's function, compiled or not. Uncompiled it holds all scores: for tests alone."""
    heads, grouped = (x.transpose(0, 1)[None] for x in (q, k, v)), q.shape[1] != k.shape[1]
    mask = _mask(run, len(k))
    out, aux = attend(*heads, block_mask=mask, enable_gqa=grouped, return_aux=AuxRequest(lse=True))
    return out[0].transpose(0, 1), aux.lse[0].transpose(0, 1)


def _mask(run: Run, length: int) -> BlockMask:
    """Made once for all layers and, in decoding, for all tokens."""

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key < run.before[query]

    if length not in run.masks:
        rows, device = len(run.before), str(run.before.device)
        run.masks[length] = create_block_mask(visible, None, None, rows, length, device=device)
    mask: BlockMask = run.masks[length]
    return mask


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)
