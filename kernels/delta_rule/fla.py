"""The (gated) delta rule on flash-linear-attention's Triton kernels (GPU, bf16).

The kernels return the output and the final state only. A pass is therefore a chain of segments of 512 tokens, whose
start states the chain has anyway; the state after p tokens is a replay of at most one segment from already projected k,
v, beta. Both are differentiable through the kernels' initial and final states.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SEGMENT = 512
DECODED = 16  # tokens that the recurrent kernel takes faster than the chunked one, where no gradient is wanted


@dataclass(frozen=True)
class SegmentTrace:
    """Start states every SEGMENT tokens, and the inputs to replay from them."""

    states: list[Tensor]  # [N, H, K, V] fp32 before each segment and after the last
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None]  # k, v, beta, g of the whole pass

    def state_at(self, rows: Tensor, positions: Tensor) -> Tensor:
        """The states after `positions[i]` tokens of sequence `rows[i]`: [P], [P] -> [P, H, K, V]."""
        segments = (positions // SEGMENT).clamp(max=len(self.states) - 1)
        starts, where = segments * SEGMENT, zip(rows.tolist(), segments.tolist(), strict=True)
        state = torch.stack([self._start(row, segment) for row, segment in where])
        longest = int((positions - starts).max())
        if longest == 0:
            return state
        offsets = torch.arange(longest, device=positions.device)
        index = (starts[:, None] + offsets).clamp(max=self.inputs[0].shape[1] - 1)
        k, v, beta, g = (None if x is None else x[rows[:, None], index] for x in self.inputs)
        assert k is not None and v is not None and beta is not None
        inside = (offsets < (positions - starts)[:, None])[
            ..., None
        ]  # a token with beta = g = 0 leaves the state as it is
        _, final = _kernel(torch.zeros_like(k), k, v, beta * inside, None if g is None else g * inside, state)
        return final

    def _start(self, row: int, segment: int) -> Tensor:
        """A sequence's state before a segment. Before the first one, consecutive sequences may share theirs."""
        states = self.states[segment]
        return states[row * states.shape[0] // self.inputs[0].shape[0]]


def fla_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor, SegmentTrace]:
    """Shapes as in `chunk_delta_rule`; o in the inputs' precision, states in fp32."""
    if state is None:
        state = k.new_zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[3], dtype=torch.float32)
    start = state
    if state.shape[0] != k.shape[0]:
        state = state.repeat_interleave(k.shape[0] // state.shape[0], 0)
    outputs, states = [], [start]
    for start_token in range(0, k.shape[1], SEGMENT):
        qs, ks, vs, bs = (x[:, start_token : start_token + SEGMENT] for x in (q, k, v, beta))
        gs = None if g is None else g[:, start_token : start_token + SEGMENT]
        o, state = _kernel(qs, ks, vs, bs, gs, state)
        outputs.append(o)
        states.append(state)
    return torch.cat(outputs, 1), state, SegmentTrace(states, (k, v, beta, g))


def _kernel(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    from fla.ops.delta_rule import chunk_delta_rule, fused_recurrent_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

    low = torch.bfloat16 if q.dtype == torch.float32 else q.dtype  # the kernels refuse fp32
    q, k, v, beta = (x.to(low).contiguous() for x in (q, k, v, beta))
    options: dict[str, Any] = {"initial_state": state.float().contiguous(), "output_final_state": True}
    recurrent = q.shape[1] <= DECODED and not torch.is_grad_enabled()
    if g is None:
        plain = fused_recurrent_delta_rule if recurrent else chunk_delta_rule
        return plain(q, k, v, beta=beta, **options)
    gated = fused_recurrent_gated_delta_rule if recurrent else chunk_gated_delta_rule
    return gated(q, k, v, g=g.float().contiguous(), beta=beta, **options)
