"""The (gated) delta rule: one signature, and the one place that chooses the kernel."""

import functools
import importlib.util
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatron_refine.kernels.delta_rule.chunk import chunk_delta_rule
from megatron_refine.kernels.fused import fused


class Trace(Protocol):
    """What a pass leaves behind to continue from any of its tokens."""

    def state_at(self, rows: Tensor, positions: Tensor) -> Tensor:
        """[P] sequence indices, [P] numbers of tokens -> states [P, H, K, V], in the graph of the pass."""
        ...


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cuts: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Trace]:
    """S <- e^g S;  S <- S + k (beta (v - S^T k))^T;  o = S^T q / sqrt(K).

    Args: q, k [N, T, H, K], k of unit length; v [N, T, H, V]; beta, g [N, T, H], g a log decay; state [P, H, K, V]
    where P divides N, each start state serving N/P consecutive sequences. With cu_seqlens [N+1], q..g hold N sequences
    end to end in one row [1, total, H, *]. cuts: numbers of tokens after which states will be asked for; None: any.
    Returns: o shaped as v, final state [N, H, K, V], trace (its rows are sequences). On a GPU in low precision the
    Triton kernels compute it; a GPU without them is a RuntimeError, never a silent slow path.
    """
    if cu_seqlens is not None:
        return _packed(q, k, v, beta, g, state, cu_seqlens)
    if q.device.type == "cuda" and q.dtype != torch.float64:
        _require_fla()
        from megatron_refine.kernels.delta_rule.fla import fla_delta_rule

        return fla_delta_rule(q, k, v, beta, g, state, cuts)
    return chunk_delta_rule(q, k, v, beta, g, state)


def _packed(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor | None, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Trace]:
    """Sequences end to end, as a padded batch: a padding row (k = beta = g = 0) writes nothing and decays nothing."""
    lengths = cu_seqlens.diff()
    offsets = torch.arange(int(lengths.max()), device=q.device)
    inside = offsets < lengths[:, None]  # [N, T]
    index = (cu_seqlens[:-1, None] + offsets).clamp(max=q.shape[1] - 1)

    def unpack(x: Tensor) -> Tensor:
        return x[0, index] * inside.view(*inside.shape, *[1] * (x.dim() - 2))

    gate = None if g is None else unpack(g)
    o, final, trace = delta_rule(unpack(q), unpack(k), unpack(v), unpack(beta), gate, state)
    return o[inside][None], final, trace


@functools.cache
def _require_fla() -> None:
    if importlib.util.find_spec("fla") is None:
        raise RuntimeError(
            "a GPU is visible but flash-linear-attention is not installed, and the torch path would be an order of "
            "magnitude slower: pip install -e '.[gpu]', or hide the GPU with CUDA_VISIBLE_DEVICES="
        )


@fused
def l2_normalize(x: Tensor) -> Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the last dimension, in at least fp32 (fla's l2norm: epsilon inside the root).

    On a GPU the result is in x's precision, as the kernels take it.
    """
    high = x.to(torch.promote_types(x.dtype, torch.float32))
    found = high * torch.rsqrt(high.pow(2).sum(-1, keepdim=True) + 1e-6)
    return found.to(x.dtype) if x.device.type == "cuda" else found
