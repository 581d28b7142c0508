"""The (gated) delta rule on flash-linear-attention's Triton kernels (GPU, bf16).

The kernels return the output and the final state only. A pass is therefore a chain of segments, whose start states the
chain has anyway: cut where states will be asked for, or, where that is not known yet, every SEGMENT tokens; the state
inside a segment is then a replay of the tokens before it from already projected k, v, beta. Both are differentiable
through the kernels' initial and final states.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SEGMENT = 1024  # shorter ones replay less, and launch more kernels
DECODED = 16  # tokens that the recurrent kernel takes faster than the chunked one, where no gradient is wanted


@dataclass(frozen=True)
class SegmentTrace:
    """Start states of the segments, and the inputs to replay from them."""

    starts: list[int]  # tokens before each segment, and in all
    states: list[Tensor]  # [N, H, K, V] fp32 before each segment and after the last
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None]  # k, v, beta, g of the whole pass

    def state_at(self, rows: Tensor, positions: Tensor) -> Tensor:
        """The states after `positions[i]` tokens of sequence `rows[i]`: [P], [P] -> [P, H, K, V]."""
        asked = list(zip(rows.tolist(), positions.tolist(), strict=True))
        segments = [bisect.bisect_right(self.starts, p) - 1 for _, p in asked]
        found = [self._start(row, segment) for (row, _), segment in zip(asked, segments, strict=True)]
        spans = [(row, self.starts[s], p) for (row, p), s in zip(asked, segments, strict=True)]
        inside = [i for i, (_, start, p) in enumerate(spans) if p > start]
        if inside:
            replayed = self._replay([spans[i] for i in inside], torch.stack([found[i] for i in inside]))
            for i, state in zip(inside, replayed, strict=True):
                found[i] = state
        return torch.stack(found)

    def _replay(self, spans: list[tuple[int, int, int]], states: Tensor) -> Tensor:
        """Final states of (row, from, to) from their start states, sequences of different lengths end to end."""
        k, v, beta, g = (
            None if x is None else torch.cat([x[row, start:end] for row, start, end in spans])[None]
            for x in self.inputs
        )
        assert k is not None and v is not None and beta is not None
        ends = torch.tensor([0, *(end - start for _, start, end in spans)]).cumsum(0)
        return _kernel(torch.zeros_like(k), k, v, beta, g, states, ends)[1]

    def _start(self, row: int, segment: int) -> Tensor:
        """A sequence's state before a segment. Before the first one, consecutive sequences may share theirs."""
        states = self.states[segment]
        return states[row * states.shape[0] // self.inputs[0].shape[0]]


def fla_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    state: Tensor | None = None,
    cuts: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, SegmentTrace]:
    """Shapes as in `chunk_delta_rule`; o in the inputs' precision, states in fp32. cuts: as in `delta_rule`."""
    if state is None:
        state = k.new_zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[3], dtype=torch.float32)
    start, length = state, k.shape[1]
    if state.shape[0] != k.shape[0]:
        state = state.repeat_interleave(k.shape[0] // state.shape[0], 0)
    cuts = range(SEGMENT, length, SEGMENT) if cuts is None else cuts
    starts = sorted({0, *(cut for cut in cuts if 0 < cut < length), length})
    outputs, states = [], [start]
    for begin, end in zip(starts, starts[1:], strict=False):
        qs, ks, vs, bs = (x[:, begin:end] for x in (q, k, v, beta))
        o, state = _kernel(qs, ks, vs, bs, None if g is None else g[:, begin:end], state)
        outputs.append(o)
        states.append(state)
    o = torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]
    return o, state, SegmentTrace(starts, states, (k, v, beta, g))


def _kernel(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, ends: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """ends [N + 1], on the CPU: N sequences end to end in one row, from N states."""
    from fla.ops.delta_rule import chunk_delta_rule, fused_recurrent_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

    low = torch.bfloat16 if q.dtype == torch.float32 else q.dtype  # the kernels refuse fp32
    q, k, v, beta = (x.to(low).contiguous() for x in (q, k, v, beta))
    options: dict[str, Any] = {"initial_state": state.float().contiguous(), "output_final_state": True}
    recurrent = ends is None and q.shape[1] <= DECODED and not torch.is_grad_enabled()
    if ends is not None:
        options |= {"cu_seqlens": ends.to(q.device), "cu_seqlens_cpu": ends}
    if g is None:
        plain = fused_recurrent_delta_rule if recurrent else chunk_delta_rule
        return plain(q, k, v, beta=beta, **options)
    gated = fused_recurrent_gated_delta_rule if recurrent else chunk_gated_delta_rule
    return gated(q, k, v, g=g.float().contiguous(), beta=beta, **options)
