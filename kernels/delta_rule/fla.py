"""The (gated) delta rule on flash-linear-attention's Triton kernels (GPU, bf16).

fla's own function returns the output and the final state only. This module calls its parts one by one instead (those
of the release that setup.py pins). So it reads states inside of a pass from what the parts compute anyway: the state
before each chunk of 64 tokens, and the rows u that the tokens write (chunk.py has the formula). The pass need not know
where they will be read, and nothing is computed twice.

A gradient takes the same way back: into the rows k and u of the chunk that was read, and into the state before it. The
part that carries the state's gradient from chunk to chunk runs once for each stretch between chunks that were read.

fla calls the rows u `v_new`; its `u` and `w` are U and W of the WY form, its decays within a chunk logarithms to base
2. The parts of the gated rule compute the plain one where there is no decay.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_refine.kernels import tuning
from megatron_refine.kernels.delta_rule.chunk import CHUNK, state_within
from megatron_refine.kernels.places import Chunks, Places

DECODED = 16  # tokens that the recurrent kernel takes faster than the chunked ones


@dataclass(frozen=True)
class Gradients:
    """Gradients of what was read of U chunks, C tokens each."""

    chunks: Chunks
    states: Tensor  # [U, H, K, V]
    keys: Tensor  # [U, C, G, K]
    writes: Tensor  # [U, C, H, V]
    decays: Tensor | None  # [U, C, H], of natural logarithms

    def add(self, name: str, target: Tensor) -> None:
        """Add the gradients of `name` to the rows of `target` [N, T, ...] that were read."""
        index, rows = (self.chunks.sequences[:, None], self.chunks.tokens), getattr(self, name).to(target.dtype)
        if self.chunks.whole:
            target[index] += rows
        else:  # the last token stands for those behind it, with zeros
            target.index_put_(index, rows, accumulate=True)


@dataclass(frozen=True)
class FlaTrace:
    """What a pass leaves behind; of no use without what `read` collects for its backward pass."""

    final: Tensor  # [N, H, K, V], whose graph is that of the pass
    states: Tensor  # [N, NT, H, K, V] before each chunk, in the inputs' precision
    keys: Tensor  # [N, T, G, K]
    writes: Tensor  # [N, T, H, V], the rows u
    decays: Tensor | None  # [N, T, H] cumulative log2 decay within the chunk
    read: list[Gradients]

    def state_at(self, places: Places) -> Tensor:
        """The states at P places -> [P, H, K, V]."""
        chunks = places.chunks(CHUNK, self.keys.shape[1])
        parts: tuple[Tensor | None, ...] = _Read.apply(self.final, self, chunks)
        if chunks.of_place is not None:
            parts = tuple(None if x is None else x[chunks.of_place] for x in parts)
        state, keys, writes, decays = parts
        assert state is not None and keys is not None and writes is not None
        keys = keys.repeat_interleave(writes.shape[2] // keys.shape[2], 2).transpose(1, 2)
        decays = None if decays is None else decays.transpose(1, 2)
        return state_within(state, keys, writes.transpose(1, 2), decays, chunks.inside)


@dataclass(frozen=True)
class NoTrace:
    """The trace of tokens that continue a state without gradient: nobody reads states inside of them."""

    def state_at(self, places: Places) -> Tensor:
        raise AssertionError("a state is read where only the final one is known")


def fla_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor, FlaTrace | NoTrace]:
    """Shapes as in `chunk_delta_rule`; o in the inputs' precision, states in fp32, those at a place rounded to the
    inputs' precision as the kernels read them."""
    low = torch.bfloat16 if q.dtype == torch.float32 else q.dtype  # the kernels refuse fp32
    high = torch.promote_types(low, torch.float32)
    q, k, v, beta = (x.to(low).contiguous() for x in (q, k, v, beta))
    g = None if g is None else g.to(high).contiguous()
    start = v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3], dtype=high) if state is None else state.to(high)
    if start.shape[0] != v.shape[0]:
        start = start.repeat_interleave(v.shape[0] // start.shape[0], 0)
    start = start.contiguous()
    few = v.shape[1] <= DECODED
    recurrent = state is not None and few and not torch.is_grad_enabled()
    _parts()  # its autotuners are there
    tuning.ready(k.shape[3], v.shape[3], g is not None, "decode" if recurrent else "branch" if few else "main")
    if recurrent:
        return *_recurrent(q, k, v, beta, g, start), NoTrace()
    read: list[Gradients] = []
    o, final, states, writes, decays = _Rule.apply(q, k, v, beta, g, start, read)
    return o, final, FlaTrace(final, states, k, writes, decays, read)


@torch.no_grad()
def fla_packed(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """As `packed_delta_rule`. What the kernels need to know of the lengths is made on the host."""
    low = torch.bfloat16 if q.dtype == torch.float32 else q.dtype  # the kernels refuse fp32
    q, k, v, beta = (x.to(low).contiguous() for x in (q, k, v, beta))
    high = torch.promote_types(low, torch.float32)
    parts, counts = _parts(), [-(-length // CHUNK) for length in lengths]
    tuning.ready(k.shape[3], v.shape[3], g is not None, "main")

    def sums(numbers: Sequence[int]) -> Tensor:
        return torch.tensor([0, *itertools.accumulate(numbers)]).to(q.device, non_blocking=True)

    numbers = [(sequence, chunk) for sequence, count in enumerate(counts) for chunk in range(count)]
    chunks = torch.tensor(numbers).to(q.device, non_blocking=True)
    packed = {"cu_seqlens": sums(lengths), "chunk_indices": chunks}
    decays = None
    if g is not None:
        decays = parts.cumsum(g.to(high).contiguous(), chunk_size=CHUNK, scale=1 / math.log(2), **packed)
    w, u, _ = parts.solve(k=k, v=v, g=decays, beta=beta, **packed)
    start = state.to(high).contiguous()
    states, writes, final = parts.states(
        k=k, w=w, u=u, g=decays, initial_state=start, output_final_state=True, chunk_offsets=sums(counts), **packed
    )
    o = parts.outputs(q=q, k=k, v=writes, h=states, g=decays, scale=q.shape[-1] ** -0.5, **packed)
    return o, final


def _recurrent(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

    found: tuple[Tensor, Tensor] = fused_recurrent_gated_delta_rule(
        q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True
    )
    return found


@functools.cache
def _parts() -> SimpleNamespace:
    """Import the parts of fla's chunked rule, forward and backward."""
    from fla.ops.common.chunk_delta_h import chunk_gated_delta_rule_bwd_dhu, chunk_gated_delta_rule_fwd_h
    from fla.ops.common.chunk_o import chunk_bwd_dqkwg, chunk_bwd_dv_local, chunk_fwd_o
    from fla.ops.gated_delta_rule.chunk_fwd import chunk_gated_delta_rule_fwd_intra
    from fla.ops.gated_delta_rule.wy_fast import prepare_wy_repr_bwd, recompute_w_u_fwd
    from fla.ops.utils import chunk_local_cumsum

    return SimpleNamespace(
        cumsum=chunk_local_cumsum,
        solve=chunk_gated_delta_rule_fwd_intra,
        states=chunk_gated_delta_rule_fwd_h,
        outputs=chunk_fwd_o,
        solve_again=recompute_w_u_fwd,
        writes_backward=chunk_bwd_dv_local,
        states_backward=chunk_gated_delta_rule_bwd_dhu,
        outputs_backward=chunk_bwd_dqkwg,
        solve_backward=prepare_wy_repr_bwd,
    )


class _Rule(torch.autograd.Function):
    """q, k [N, T, G, K], v [N, T, H, V], beta, g [N, T, H], state [N, H, K, V], all contiguous -> o, the final state;
    without gradient, what a trace is made of."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, read: list[Gradients]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        parts = _parts()
        decays = None if g is None else parts.cumsum(g, chunk_size=CHUNK, scale=1 / math.log(2))
        w, u, solved = parts.solve(k=k, v=v, g=decays, beta=beta)
        states, writes, final = parts.states(k=k, w=w, u=u, g=decays, initial_state=state, output_final_state=True)
        o = parts.outputs(q=q, k=k, v=writes, h=states, g=decays, scale=q.shape[-1] ** -0.5)
        ctx.save_for_backward(q, k, v, beta, decays, solved, state)
        ctx.read = read
        ctx.set_materialize_grads(False)  # there would be zeros for all states
        ctx.mark_non_differentiable(*(x for x in (states, writes, decays) if x is not None))
        return o, final, states, writes, decays

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        parts, (q, k, v, beta, decays, solved, state) = _parts(), ctx.saved_tensors
        do = torch.zeros_like(v) if do is None else do.contiguous()
        dfinal = torch.zeros_like(state) if dfinal is None else dfinal.contiguous()
        read, given = list(ctx.read), {"g": decays, "scale": q.shape[-1] ** -0.5}
        ctx.read.clear()
        w, u = parts.solve_again(k=k, v=v, beta=beta, A=solved, g=decays)
        states, writes, _ = parts.states(k=k, w=w, u=u, g=decays, initial_state=state, output_final_state=False)
        dwrites = parts.writes_backward(q=q, k=k, do=do, **given)
        _enter("writes", dwrites, read)
        dstates, dstate, dwrites = _carry(q, k, w, do, dwrites, dfinal, read, given)
        dq, dk, dw, dg = parts.outputs_backward(
            q=q, k=k, v=writes, w=w, h=states, dv=dwrites, do=do, dh=dstates, **given
        )
        more, dv, dbeta, dg_more = parts.solve_backward(
            k=k, v=v, beta=beta, g=decays, A=solved, dw=dw, du=dwrites
        )  # fmt: skip
        _enter("keys", dk.add_(more), read)
        if decays is not None:
            _enter("decays", dg.add_(dg_more), read)
            dg = parts.cumsum(dg, chunk_size=CHUNK, reverse=True)
        return dq, dk, dv, dbeta, dg, dstate, None


def _enter(name: str, target: Tensor, read: list[Gradients]) -> None:
    for gradients in read:
        gradients.add(name, target)


def _carry(
    q: Tensor, k: Tensor, w: Tensor, do: Tensor, dwrites: Tensor, later: Tensor, read: list[Gradients], given: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """From the last chunk to the first, from `later` [N, H, K, V], the final state's gradient: gradients of the states
    after each chunk [N, NT, H, K, V], of the start state, and of the rows u [N, T, H, V]."""
    entering: dict[int, list[tuple[int, Tensor]]] = {}
    for gradients in read:
        for (sequence, number), grad in zip(gradients.chunks.on_host, gradients.states, strict=True):
            entering.setdefault(number, []).append((sequence, grad))
    bounds = sorted({0, -(-k.shape[1] // CHUNK), *entering})
    found = []
    for first, end in reversed(list(itertools.pairwise(bounds))):
        tokens = slice(first * CHUNK, end * CHUNK)
        own = {"q": q, "k": k, "w": w, "do": do, "dv": dwrites, "g": given["g"]}
        own = {name: None if x is None else x[:, tokens].contiguous() for name, x in own.items()}
        states, later, writes = _parts().states_backward(**own, h0=later, dht=later, scale=given["scale"])
        for sequence, grad in entering.get(first, ()):
            later[sequence].add_(grad)
        found.append((states, writes))
    if len(found) == 1:
        return states, later, writes
    dstates, dwrites = (torch.cat(x, 1) for x in zip(*reversed(found), strict=True))
    return dstates, later, dwrites


class _Read(torch.autograd.Function):
    """Of U chunks the state before them [U, H, K, V], and of their tokens k [U, C, G, K], u [U, C, H, V] and decays
    [U, C, H], natural logarithms.

    The gradients wait in the trace for the rule's backward pass, which comes later: it made `final`, an input here.
    """

    @staticmethod
    def forward(ctx: Any, final: Tensor, trace: FlaTrace, chunks: Chunks) -> tuple[Tensor | None, ...]:
        ctx.read, ctx.chunks = trace.read, chunks  # not the trace, which pins the pass
        index = chunks.sequences[:, None], chunks.tokens
        state = trace.states[chunks.sequences, chunks.numbers].to(final.dtype)
        keys, writes = trace.keys[index].to(final.dtype), trace.writes[index].to(final.dtype)
        return state, keys, writes, None if trace.decays is None else trace.decays[index] * math.log(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        ctx.read.append(Gradients(ctx.chunks, *grads))
        return None, None, None
