"""The (gated) delta rule: one signature, and the one place that chooses the kernel."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_refine import extras
from megatron_refine.kernels import tuning
from megatron_refine.kernels.delta_rule.chunk import CHUNK, chunk_delta_rule
from megatron_refine.kernels.fused import fused
from megatron_refine.kernels.places import Places
from megatron_refine.platform import hardware
from megatron_refine.platform.hardware import on_gpu


class Trace(Protocol):
    """What a pass leaves behind to continue from any of its tokens."""

    def state_at(self, places: Places) -> Tensor:
        """The states at P places -> [P, H, K, V], in the graph of the pass."""
        ...


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Trace]:
    """S <- e^g S;  S <- S + k (beta (v - S^T k))^T;  o = S^T q / sqrt(K).

    Args: q, k [N, T, G, K], k of unit length, where G divides H: each serves H/G consecutive heads; v [N, T, H, V];
    beta, g [N, T, H], g a log decay; state [P, H, K, V] where P divides N, each start state serving N/P consecutive
    sequences. Returns: o shaped as v, final state [N, H, K, V], trace. On a GPU in low precision the Triton kernels
    compute it; a GPU without them is a ConfigError, never a silent slow path.
    """
    if on_gpu(q) and q.dtype != torch.float64:
        _require_fla()
        from megatron_refine.kernels.delta_rule.fla import fla_delta_rule

        return fla_delta_rule(q, k, v, beta, g, state)
    return chunk_delta_rule(q, k, v, beta, g, state)


def packed_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The rule of N sequences end to end, each from a state of its own, without gradient.

    Args: q, k [1, R, G, K], v [1, R, H, V], beta, g [1, R, H], shaped as for `delta_rule`; state [N, H, K, V]; lengths,
    N numbers above 0 that add up to R.
    Returns: o [1, R, H, V], final states [N, H, K, V]. No row is computed besides the R, and those that fill up chunks.
    """
    if on_gpu(q) and q.dtype != torch.float64:
        _require_fla()
        from megatron_refine.kernels.delta_rule.fla import fla_packed

        return fla_packed(q, k, v, beta, g, state, lengths)
    starts, o, finals = [0, *itertools.accumulate(lengths)], torch.empty(0), torch.empty_like(state)
    # sequences of as many chunks at once, as zeros fill up the last one in any case; within one chunk, of one length
    sizes = [length if length <= CHUNK else -(-length // CHUNK) * CHUNK for length in lengths]
    for size in sorted(set(sizes)):
        mine = [i for i, own in enumerate(sizes) if own == size]
        own, places = torch.tensor([lengths[i] for i in mine]), torch.arange(max(lengths[i] for i in mine))
        rows = torch.tensor([starts[i] for i in mine])[:, None] + places.minimum(own[:, None] - 1)
        real = (places < own[:, None])[..., None]
        keys, rates = k[0, rows] * real[..., None], beta[0, rows] * real
        decay = None if g is None else g[0, rows] * real
        found, final, _ = chunk_delta_rule(q[0, rows], keys, v[0, rows], rates, decay, state[mine])
        o = o if len(o) else found.new_empty(v.shape)
        o[0, rows[real[..., 0]]], finals[mine] = found[real[..., 0]], final.to(finals.dtype)
    return o, finals


def used(costs: Sequence[Any], gpu: bool) -> str:
    """Say what computes it on this machine, for layers of these costs (models/mixers/delta/cost.py)."""
    if not gpu:
        return "delta rule: torch"
    names = (tuning.shape_name(cost.key_dim, cost.value_dim, cost.gated_rule) for cost in costs)
    told = ", ".join(tuning.told(hardware.architecture(), name) for name in names)
    return f"delta rule: flash-linear-attention {extras.FLA}, configurations {told}"


@functools.cache
def _require_fla() -> None:
    extras.check_fla()


@fused
def l2_normalize(x: Tensor) -> Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the last dimension, in at least fp32 (fla's l2norm: epsilon inside the root).

    On a GPU the result is in x's precision, as the kernels take it.
    """
    high = x.to(torch.promote_types(x.dtype, torch.float32))
    found = high * torch.rsqrt(high.pow(2).sum(-1, keepdim=True) + 1e-6)
    return found.to(x.dtype) if on_gpu(x) else found
