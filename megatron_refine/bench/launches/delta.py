"""The delta rule of flash-linear-attention 0.6.0, kernel by kernel, in the place of the package.

Read off its sources: which kernels each part launches, which tensors a kernel reads and writes, once each, and its
matrix products. G key heads, H value heads of widths K and V, chunks of C = 64 tokens, N sequences. Zeros that a part
fills are a launch, and so are sums over the value heads of a key head.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_refine import extras
from megatron_refine.bench.launches.counter import Counter, Work, moved

CHUNK = 64
Found = tuple[Any, ...]


def install(counter: Counter) -> None:
    """Put modules into the place of fla's, installed or not, whose functions are counted."""
    parts = Parts(counter)
    functions: dict[str, Sequence[str]] = {
        "fla": (), "fla.ops": (), "fla.ops.common": (),
        "fla.ops.common.chunk_delta_h": ("chunk_gated_delta_rule_fwd_h", "chunk_gated_delta_rule_bwd_dhu"),
        "fla.ops.common.chunk_o": ("chunk_fwd_o", "chunk_bwd_dv_local", "chunk_bwd_dqkwg"),
        "fla.ops.gated_delta_rule": ("fused_recurrent_gated_delta_rule",),
        "fla.ops.gated_delta_rule.chunk_fwd": ("chunk_gated_delta_rule_fwd_intra",),
        "fla.ops.gated_delta_rule.wy_fast": ("recompute_w_u_fwd", "prepare_wy_repr_bwd"),
        "fla.ops.utils": ("chunk_local_cumsum",),
    }  # fmt: skip
    for path, names in functions.items():
        module = ModuleType(path)
        module.__spec__, module.__path__ = ModuleSpec(path, None, is_package=True), []
        for name in names:
            setattr(module, name, getattr(parts, name))
        sys.modules[path] = module
    sys.modules["fla"].__version__ = extras.FLA  # type: ignore[attr-defined]


class Parts:
    """Functions with the names and arguments of fla's. q, k [N, T, G, K]; v, o [N, T, H, V]; beta, g [N, T, H]; A
    [N, T, H, C], the inverse of each chunk; w [N, T, H, K]; h [N, chunks, H, K, V], the states before the chunks."""

    def __init__(self, counter: Counter):
        self.counter = counter

    def _kernel(self, name: str, tensors: Any, flops: float = 0.0, launches: int = 1) -> None:
        dtype = next(x.dtype for x in tensors if isinstance(x, Tensor))
        self.counter.add(Work(f"fla {name}", dtype, moved(tensors), launches, flops, products=True))

    def chunk_local_cumsum(self, g: Tensor, chunk_size: int = CHUNK, **_: Any) -> Tensor:
        found = torch.empty_like(g, dtype=torch.float32)
        self._kernel("sums of g", [g, found])
        return found

    def chunk_gated_delta_rule_fwd_intra(self, k: Tensor, v: Tensor, g: Any, beta: Tensor, **_: Any) -> Found:
        inverse = k.new_empty(*beta.shape, CHUNK)
        self._kernel("zeros", [inverse])
        solving = 2.0 * beta.numel() * CHUNK * CHUNK / 3
        self._kernel("A", [k, g, beta, inverse], products(v, CHUNK * k.shape[-1]) + solving)
        return *self.recompute_w_u_fwd(k, v, beta, inverse, g), inverse

    def recompute_w_u_fwd(self, k: Tensor, v: Tensor, beta: Tensor, A: Tensor, g: Any = None, **_: Any) -> Found:
        w, u = k.new_empty(*v.shape[:3], k.shape[-1]), torch.empty_like(v)
        self._kernel("w, u", [k, v, beta, A, g, w, u], products(v, CHUNK * (k.shape[-1] + v.shape[-1])))
        return w, u

    def chunk_gated_delta_rule_fwd_h(
        self, k: Tensor, w: Tensor, u: Tensor, g: Any = None, initial_state: Any = None,
        output_final_state: bool = False, **_: Any,
    ) -> Found:  # fmt: skip
        size = u.shape[2], k.shape[-1], u.shape[-1]
        h = k.new_empty(k.shape[0], -(-k.shape[1] // CHUNK), *size)
        sequences = k.shape[0] if initial_state is None else len(initial_state)  # more than one may lie in a row
        final = k.new_empty(sequences, *size, dtype=torch.float32) if output_final_state else None
        if final is not None:
            self._kernel("zeros", [final])
        writes = torch.empty_like(u)
        self._kernel("h", [k, w, u, g, initial_state, h, writes, final], 2 * products(u, k.shape[-1] * u.shape[-1]))
        return h, writes, final

    def chunk_fwd_o(self, q: Tensor, k: Tensor, v: Tensor, h: Tensor, g: Any = None, **_: Any) -> Tensor:
        o, width = torch.empty_like(v), q.shape[-1]
        flops = products(v, width * v.shape[-1] + CHUNK * (width + v.shape[-1]))
        self._kernel("o", [q, k, v, h, g, o], flops)
        return o

    def chunk_bwd_dv_local(self, q: Tensor, k: Tensor, do: Tensor, g: Any = None, **_: Any) -> Tensor:
        dv = torch.empty_like(do)
        self._kernel("dv", [q, k, do, g, dv], products(do, CHUNK * (q.shape[-1] + do.shape[-1])))
        return dv

    def chunk_gated_delta_rule_bwd_dhu(
        self, q: Tensor, k: Tensor, w: Tensor, do: Tensor, dv: Tensor, g: Any = None, h0: Any = None, dht: Any = None,
        **_: Any,
    ) -> Found:  # fmt: skip
        dh = q.new_empty(q.shape[0], -(-q.shape[1] // CHUNK), do.shape[2], q.shape[-1], do.shape[-1])
        dh0, into_u = None if h0 is None else torch.empty_like(h0, dtype=torch.float32), torch.empty_like(dv)
        flops = 3 * products(do, q.shape[-1] * do.shape[-1])
        self._kernel("dh", [q, k, w, do, dv, g, dht, dh, dh0, into_u], flops)
        return dh, dh0, into_u

    def chunk_bwd_dqkwg(
        self, q: Tensor, k: Tensor, v: Tensor, do: Tensor, h: Tensor, dh: Tensor, w: Any = None, g: Any = None,
        dv: Any = None, **_: Any,
    ) -> Found:  # fmt: skip
        keys, values = k.shape[-1], v.shape[-1]
        dq, dk, dw = (q.new_empty(*v.shape[:3], keys) for _ in range(3))
        dg = None if g is None else torch.empty_like(g, dtype=torch.float32)
        flops = products(v, 3 * keys * values + CHUNK * (values + 3 * keys))
        self._kernel("dq, dk, dw", [q, k, v, do, h, dh, w, g, dv, dq, dk, dw, *[dg] * -(-keys // 128)], flops)
        if dg is not None:
            self._kernel("sums of dg", [dg, *[dg] * -(-keys // 128)])
        return self._grouped(dq, q), self._grouped(dk, k), dw, dg

    def prepare_wy_repr_bwd(
        self, k: Tensor, v: Tensor, beta: Tensor, A: Tensor, dw: Tensor, du: Tensor, g: Any = None, **_: Any
    ) -> Found:
        dk, dv, dbeta = torch.empty_like(dw), torch.empty_like(v), torch.empty_like(beta)
        dg = None if g is None else torch.empty_like(g)
        flops = products(v, CHUNK * (4 * k.shape[-1] + 2 * v.shape[-1] + 2 * CHUNK))
        self._kernel("dk, dv, dbeta", [k, v, beta, A, dw, du, g, dk, dv, dbeta, dg], flops)
        return self._grouped(dk, k), dv, dbeta, dg

    def _grouped(self, gradient: Tensor, like: Tensor) -> Tensor:
        """[N, T, H, K] -> [N, T, G, K], the sum over the value heads of a key head."""
        if gradient.shape == like.shape:
            return gradient
        found = torch.empty_like(like)
        self._kernel("sums over heads", [gradient, found])
        return found

    def fused_recurrent_gated_delta_rule(
        self, q: Tensor, k: Tensor, v: Tensor, g: Any = None, beta: Any = None, initial_state: Any = None, **_: Any
    ) -> Found:
        o, final = torch.empty_like(v), torch.empty_like(initial_state, dtype=torch.float32)
        tensors = [q, k, v, g, beta, initial_state, o, final]
        self._kernel("recurrent", tensors, 3 * products(v, q.shape[-1] * v.shape[-1]))
        return o, final


def products(v: Tensor, each: int) -> float:
    """FLOPs where every row of every value head takes part in products of `each` multiply-adds."""
    return 2.0 * v.shape[0] * v.shape[1] * v.shape[2] * each
