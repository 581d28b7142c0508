"""Sliding-window attention on a GPU: flash-attn in half precision where it is installed, else FlexAttention."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


def gpu_window_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """As `window_attention`: q, k, v [N, T, h, d] -> [N, T, h, d]."""
    if q.dtype in (torch.bfloat16, torch.float16) and _has_flash():
        from flash_attn import flash_attn_func

        out: Tensor = flash_attn_func(q, k, v, causal=True, window_size=(window - 1, 0))
        return out
    return flex_window_attention(q, k, v, window, _compiled())


def flex_window_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, attend: Callable[..., Any] = flex_attention
) -> Tensor:
    """The same by FlexAttention; `attend` is torch's function, compiled or not. Blocks outside of the band are skipped.

    Uncompiled it holds the whole matrix of scores: for tests alone.
    """
    mask = _band(q.shape[1], window, str(q.device))
    out: Tensor = attend(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask)
    return out.transpose(1, 2)


@functools.lru_cache(maxsize=32)
def _band(length: int, window: int, device: str) -> BlockMask:
    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < window)

    return create_block_mask(visible, None, None, length, length, device=device)


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def _has_flash() -> bool:
    return importlib.util.find_spec("flash_attn") is not None
