"""DeltaNet's sequence mixer on Megatron-Core: heads over tensor-parallel ranks, complete rows inside.

Per head (facts of flash-linear-attention's DeltaNet layer, arXiv 2406.06484):
    q, k, v = SiLU(conv4(x Wq)), SiLU(conv4(x Wk)), SiLU(conv4(x Wv));  q, k of unit length;  beta = sigmoid(x wb)
    o = delta_rule(q, k, v, beta);  y = Wo RMSNorm(o)
The projections are one matrix, head-major [q | k | v | beta] per head, so that one gather feeds it and tp shards it
along axis 0.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from megatron_refine.kernels.delta_rule import Trace, delta_rule, l2_normalize
from megatron_refine.models.common.conv import short_conv
from megatron_refine.models.common.norm import HeadNorm
from megatron_refine.models.delta_net.config import DeltaNetConfig
from megatron_refine.models.mixer import Mixer


@dataclass(frozen=True)
class DeltaState:
    """All that the mixer knows of the tokens so far, of P sequences."""

    memory: Tensor  # [P, H, K, V], at least fp32
    tail: Tensor  # [P, W-1, H, 2K+V], the last rows before the convolution

    def detach(self) -> "DeltaState":
        return DeltaState(self.memory.detach(), self.tail.detach())

    def fork(self, n: int) -> "DeltaState":
        return DeltaState(self.memory.repeat_interleave(n, 0), self.tail.repeat_interleave(n, 0))


@dataclass(frozen=True)
class DeltaHandle:
    """A finished main pass."""

    trace: Trace
    rows: Tensor  # [B, T, H, 2K+V], before the convolution
    width: int

    def at(self, sequences: Tensor, positions: Tensor) -> DeltaState:
        before = positions[:, None] + torch.arange(1 - self.width, 0, device=positions.device)  # [P, W-1]
        tail = self.rows[sequences[:, None], before.clamp(min=0)] * (before >= 0)[..., None, None]
        return DeltaState(self.trace.state_at(sequences, positions), tail)


class DeltaNetMixer(Mixer):
    """DeltaNet as a Megatron self-attention module; built by a ModuleSpec with `model` in its params."""

    def __init__(self, config: Any, layer_number: int, model: DeltaNetConfig, pg_collection: Any, **_: Any):
        super().__init__(config)
        self.layer_number, self.tp_group = layer_number, pg_collection.tp
        self.heads = model.num_heads // self.tp_group.size()
        self.key_dim, self.value_dim = model.head_dim_k, model.head_dim_v
        self.channels = 2 * self.key_dim + self.value_dim  # of a head, before the convolution
        linear = {"config": config, "bias": False, "tp_group": self.tp_group, "skip_bias_add": True}
        self.in_proj = ColumnParallelLinear(
            model.hidden_size,
            model.num_heads * (self.channels + 1),
            init_method=config.init_method,
            gather_output=False,
            **linear,
        )
        self.conv = nn.Parameter(torch.empty(self.heads * self.channels, 1, model.conv_size, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.conv, True, 0, 1)
        bound = model.conv_size**-0.5  # torch's default for a convolution of one channel a group
        self.conv.initialize = lambda full, generator: full.uniform_(-bound, bound, generator=generator)  # type: ignore
        self.o_norm = HeadNorm(config, self.value_dim, model.norm_eps)
        self.out_proj = RowParallelLinear(
            model.num_heads * self.value_dim, model.hidden_size, init_method=config.output_layer_init_method,
            input_is_parallel=True, **linear,
        )  # fmt: skip

    def project(self, hidden: Tensor) -> Tensor:
        return self.in_proj(hidden)[0].unflatten(-1, (self.heads, self.channels + 1))

    def main(self, rows: Tensor) -> tuple[Tensor, DeltaHandle]:
        (q, k, v, beta), before = self._inputs(rows, None)
        o, _, trace = delta_rule(q, k, v, beta)
        return o, DeltaHandle(trace, before, self.conv.shape[-1])

    def branch(self, rows: Tensor, state: DeltaState) -> tuple[Tensor, DeltaState]:
        tail = state.tail.repeat_interleave(rows.shape[0] // state.tail.shape[0], 0)
        (q, k, v, beta), before = self._inputs(rows, tail)
        o, memory, _ = delta_rule(q, k, v, beta, state=state.memory)
        return o, DeltaState(memory, torch.cat([tail, before], 1)[:, before.shape[1] :])

    def _inputs(self, rows: Tensor, tail: Tensor | None) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """[N, m, H, 2K+V+1] -> (q, k, v [N, m, H, *], beta [N, m, H]) and the rows before the convolution."""
        before, beta = rows.split([self.channels, 1], -1)
        mixed = short_conv(before, self.conv.view(self.heads, self.channels, -1), tail)
        q, k, v = mixed.split([self.key_dim, self.key_dim, self.value_dim], -1)
        return (
            l2_normalize(q),
            l2_normalize(k),
            v,
            beta[..., 0].to(torch.promote_types(beta.dtype, torch.float32)).sigmoid(),
        ), before

    def output(self, mixed: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.out_proj(self.o_norm(mixed).to(rows.dtype).flatten(-2))

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Adds the convolution, sharded by heads, to what Megatron's layers declare of themselves."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        own = {"conv": self.conv}
        state.update(
            make_sharded_tensors_for_checkpoint(
                own,
                prefix,
                {"conv": 0},
                sharded_offsets,
                tp_group=self.tp_group,
                dp_cp_group=(metadata or {}).get("dp_cp_group"),
            )
        )
        return state
