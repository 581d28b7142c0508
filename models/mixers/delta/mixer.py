"""What the mixers with a delta-rule memory share: convolution, state, main stream and branches from its positions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from megatron_refine.kernels.delta_rule import Trace, delta_rule
from megatron_refine.kernels.places import Places
from megatron_refine.kernels.short_conv import convolved
from megatron_refine.kernels.tap import Tap
from megatron_refine.models.common.norm import HeadNorm
from megatron_refine.models.mixer import Mixer, sharded


@dataclass(frozen=True)
class DeltaState:
    """All that the mixer knows of the tokens so far, of P sequences."""

    memory: Tensor  # [P, H, K, V], at least fp32
    tail: Tensor  # [P, W-1, G, D], the last rows before the convolution

    def tensors(self) -> list[Tensor]:
        return [self.memory, self.tail]

    def detach(self) -> "DeltaState":
        return DeltaState(self.memory.detach(), self.tail.detach())

    def part(self, positions: slice) -> "DeltaState":
        return DeltaState(self.memory[positions], self.tail[positions])

    def fork(self, n: int) -> "DeltaState":
        return DeltaState(self.memory.repeat_interleave(n, 0), self.tail.repeat_interleave(n, 0))

    def fixed(self, tokens: int) -> "DeltaState":
        return self


@dataclass(frozen=True)
class DeltaHandle:
    """A finished main pass."""

    trace: Trace
    rows: Tap  # [B, T, G, D + ...], before the convolution
    channels: int  # D
    width: int

    def at(self, places: Places) -> DeltaState:
        before, real = places.before(self.width - 1)  # [P, W-1]
        tail = self.rows.read(places.sequences[:, None], before)[..., : self.channels] * real[..., None, None]
        return DeltaState(self.trace.state_at(places), tail)


class DeltaMixer(Mixer):
    """A delta-rule mixer as a Megatron self-attention module.

    One input projection, cut into G groups of heads: D columns of a group (its queries, keys and values) pass the
    convolution, the others do not. Group-major, so that one gather feeds it and tp shards it along axis 0.
    A family says how many columns, and makes the other inputs of the delta rule of the others.
    """

    def __init__(
        self, config: Any, layer_number: int, pg_collection: Any, *,
        hidden: int, groups: int, key_dim: int, channels: int, others: list[int], heads: int, value_dim: int,
        conv_size: int, eps: float,
    ):  # fmt: skip
        """groups G and value heads are those of all ranks; channels D, of which key_dim are of queries and key_dim of
        keys, and others, the widths of what is not convolved, are columns a group; the first of these may stay behind
        when rows travel to other ranks."""
        super().__init__(config)
        self.layer_number, self.tp_group, self.cp_group = layer_number, pg_collection.tp, pg_collection.cp
        self.groups, self.channels, self.others = groups // self.tp_group.size(), channels, others
        self.key_dim, self.heads = key_dim, heads // self.tp_group.size()
        linear = {"config": config, "bias": False, "tp_group": self.tp_group, "skip_bias_add": True}
        self.in_proj = ColumnParallelLinear(
            hidden, groups * (channels + sum(others)), init_method=config.init_method, gather_output=False, **linear
        )
        bound = conv_size**-0.5  # torch's default for a convolution of one channel a group
        self.conv = sharded(
            torch.empty(self.groups * channels, 1, conv_size, dtype=config.params_dtype),
            lambda full, generator: full.uniform_(-bound, bound, generator=generator),
        )
        self.o_norm = HeadNorm(config, value_dim, eps)
        self.out_proj = RowParallelLinear(
            heads * value_dim, hidden, init_method=config.output_layer_init_method, input_is_parallel=True, **linear
        )

    def own_parameters(self) -> dict[str, nn.Parameter]:
        return {"conv": self.conv}

    def rule_inputs(self, q: Tensor, k: Tensor, v: Tensor, others: Sequence[Tensor]) -> dict[str, Tensor]:
        """After the convolution q, k [N, m, G, K], v [N, m, G, *], and the others [N, m, G, *] -> q, k [N, m, G, K], v,
        beta, g [N, m, H, *] of the delta rule, with this rank's heads."""
        raise NotImplementedError

    def read_out(self, o: Tensor, others: Sequence[Tensor]) -> Tensor:
        """Outputs of the delta rule [N, m, H, V], and the columns of their rows that were not convolved -> what
        `output` takes, shaped alike."""
        return o

    def project(self, hidden: Tensor) -> Tensor:
        return self.in_proj(hidden)[0].unflatten(-1, (self.groups, self.channels + sum(self.others)))

    def main(self, rows: Tensor) -> tuple[Tensor, DeltaHandle]:
        tap = Tap.on(rows)
        inputs, others = self._inputs(tap.stream, None)
        o, _, trace = delta_rule(**inputs)
        return self.read_out(o, others), DeltaHandle(trace, tap, self.channels, self.conv.shape[-1])

    def branch(self, rows: Tensor, state: DeltaState) -> tuple[Tensor, DeltaState]:
        tail = state.tail.repeat_interleave(rows.shape[0] // state.tail.shape[0], 0)
        inputs, others = self._inputs(rows, tail)
        o, memory, _ = delta_rule(**inputs, state=state.memory)
        last = torch.cat([tail, rows[..., : self.channels]], 1)[:, -tail.shape[1] :]
        return self.read_out(o, others), DeltaState(memory, last)

    def _inputs(self, rows: Tensor, tail: Tensor | None) -> tuple[dict[str, Any], Sequence[Tensor]]:
        """[N, m, G, *] -> inputs of the delta rule, and the columns that are not convolved."""
        first, *rest = self.others
        absent = self.channels + sum(self.others) - rows.shape[-1]
        weight = self.mine(self.conv.view(self.groups, self.channels, -1))
        q, k, v, *others = convolved(rows, weight, tail, self.key_dim, [first - absent, *rest])
        return self.rule_inputs(q, k, v, others), others

    def output(self, mixed: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.out_proj(self.o_norm(mixed).to(rows.dtype).flatten(-2))
