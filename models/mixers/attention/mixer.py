"""Softmax attention on Megatron-Core: key heads, with their query heads, over tensor-parallel ranks.

Facts of the attention layers of Qwen3.5 and Olmo-Hybrid (transformers 5.24):
    q, k, v = x Wq, x Wk, x Wv;  qk_norm: RMSNorm of q and k, over each head or over all heads together
    RoPE turns the first rotary_dims of each head, their two halves paired
    o = softmax(q k^T / sqrt(d)) v over the tokens up to its own;  y = Wo (o sigmoid(x Wg)), or Wo o without a gate
q_proj holds, query head by query head, the rows [q | gate]; kv_proj, key head by key head, [k | v]; q_norm and k_norm
are those of a head, which all share, or of all heads one after the other.

The rows of a pass lie unit by unit: [its query heads | k | v], a unit being a key head with some of its query heads.
Where tp * cp ranks are more than key heads, several units have the same key head. Where tp does not divide the key
heads, every tp rank has kv_proj whole and projects by the rows that it needs: the same parameter at any layout.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor, nn

from megatron_refine.kernels.places import Places
from megatron_refine.kernels.softmax_attention import branch_attention, causal_attention
from megatron_refine.models.common.rope import Table, first_positions, table
from megatron_refine.models.mixer import Mixer, partial, sharded
from megatron_refine.models.mixers.attention.config import AttentionConfig
from megatron_refine.models.mixers.attention.inputs import Norms, gated, mean_squares, prepared, scaled, split
from megatron_refine.models.mixers.attention.state import AttentionState


@dataclass(frozen=True)
class AttentionHandle:
    """A finished main pass."""

    keys: Tensor  # [B, T, G, d], normed and turned by position
    values: Tensor

    def at(self, places: Places) -> AttentionState:
        return AttentionState(self.keys, self.values, places)


class AttentionMixer(Mixer):
    """Built by a ModuleSpec with `model` in its params."""

    def __init__(self, config: Any, layer_number: int, model: AttentionConfig, pg_collection: Any, **_: Any):
        super().__init__(config)
        layer = self.layer = model
        self.layer_number = layer_number
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        tp = self.tp_group.size()
        self.all_units = layer.units(tp * self.cp_group.size())
        assert layer.heads % self.all_units == 0, f"{layer.heads} heads cannot be cut into {self.all_units} units"
        self.units, self.queries = self.all_units // tp, layer.heads // self.all_units
        self.whole_keys = layer.kv_heads % tp != 0
        columns = self.all_units * (self.queries * layer.query_width + 2 * layer.head_dim)
        linear = {"config": config, "bias": False, "tp_group": self.tp_group, "skip_bias_add": True}
        self.in_proj = ColumnParallelLinear(
            layer.hidden, columns, init_method=config.init_method, gather_output=False,
            skip_weight_param_allocation=True, **linear,
        )  # fmt: skip
        self.q_proj = sharded(self._empty(layer.heads // tp * layer.query_width, layer.hidden))
        self.kv_proj = self._of_keys(2 * layer.head_dim, layer.hidden)
        self._add_norms(tp)
        self.out_proj = RowParallelLinear(
            layer.heads * layer.head_dim, layer.hidden, init_method=config.output_layer_init_method,
            input_is_parallel=True, **linear,
        )  # fmt: skip

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.config.params_dtype)

    def _of_keys(self, rows: int, *rest: int, **fill: Any) -> nn.Parameter:
        """A parameter with `rows` rows a key head."""
        if self.whole_keys:
            return partial(self._empty(self.layer.kv_heads * rows, *rest), **fill)
        return sharded(self._empty(self.layer.kv_heads // self.tp_group.size() * rows, *rest), **fill)

    def _add_norms(self, tp: int) -> None:
        layer, fill = self.layer, {"initialize": _zeros} if self.layer.zero_centred else {}
        if layer.qk_norm == "head":
            self.q_norm, self.k_norm = (partial(self._empty(layer.head_dim), **fill) for _ in range(2))
        elif layer.qk_norm == "projection":
            self.q_norm = sharded(self._empty(layer.heads // tp * layer.head_dim), **fill)
            self.k_norm = self._of_keys(layer.head_dim, **fill)

    def own_parameters(self) -> dict[str, nn.Parameter]:
        own = dict(self.named_parameters(recurse=False))
        return {name: p for name, p in own.items() if not hasattr(p, "tp_partial")}

    def project(self, hidden: Tensor) -> Tensor:
        """[S/cp (/tp), B, hidden] -> [S/cp, B, units/tp, *]."""
        q = self.q_proj.unflatten(0, (self.units, -1))
        kv = self._of_units(self.kv_proj.unflatten(0, (-1, 2 * self.layer.head_dim)))
        weight = torch.cat([q, kv], 1).flatten(0, 1)
        rows = self.in_proj(hidden, weight)[0].unflatten(-1, (self.units, -1))
        return self._normed(rows) if self.layer.qk_norm == "projection" else rows

    def _of_units(self, by_key: Tensor) -> Tensor:
        """A parameter here, by key head [G or G/tp, ...] -> of the key head of each unit of this rank, [U/tp, ...]."""
        repeats = self.all_units // self.layer.kv_heads
        every = by_key.repeat_interleave(repeats, 0) if repeats > 1 else by_key
        return every.chunk(self.tp_group.size())[self.tp_group.rank()] if self.whole_keys else every

    def _normed(self, rows: Tensor) -> Tensor:
        """Rows with the norm over all queries, and over all keys, of every tp rank. Each key head is in equally many
        units, so the mean over those of all units is that over the key heads."""
        layer, high = self.layer, torch.promote_types(rows.dtype, torch.float32)
        mean = mean_squares(rows, self.queries, layer.head_dim, self.all_units)
        mean = reduce_from_tensor_model_parallel_region(mean, self.tp_group)
        mean = copy_to_tensor_model_parallel_region(mean, self.tp_group)  # used for this rank's heads alone
        q = self.q_norm.unflatten(0, (self.units, self.queries, -1)).to(high) + layer.zero_centred
        k = self._of_units(self.k_norm.unflatten(0, (-1, layer.head_dim))).to(high) + layer.zero_centred
        return scaled(rows, self.queries, layer.head_dim, (mean + layer.eps).rsqrt(), (q, k))

    def mixed_columns(self, rows: Tensor) -> Tensor:
        """All but the gates."""
        if not self.layer.gate:
            return rows
        heads, k, v = split(rows, self.queries, self.layer.head_dim)
        return torch.cat([heads[..., : self.layer.head_dim].flatten(-2), k, v], -1)

    def main(self, rows: Tensor) -> tuple[Tensor, AttentionHandle]:
        layer, turn = self.layer, None
        if layer.rotary_dims:
            turn = first_positions(rows.shape[1], layer.rotary_dims // 2, layer.rope_theta, rows.dtype, rows.device)
        q, k, v = self._inputs(rows, turn)
        return causal_attention(q, k, v), AttentionHandle(k, v)

    def branch(self, rows: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        layer, turn, places = self.layer, None, state.places
        if layer.rotary_dims:
            starts = (places.tokens + state.fed).repeat_interleave(len(rows) // len(places.on_host))
            positions = starts[:, None] + torch.arange(rows.shape[1], device=rows.device)
            turn = table(positions, layer.rotary_dims // 2, layer.rope_theta, rows.dtype)
        q, k, v = self._inputs(rows, turn)
        state = state.fed_with(k, v)
        assert state.own is not None
        return branch_attention(q, (state.keys, state.values), state.own, places), state

    def _inputs(self, rows: Tensor, turn: Table | None) -> tuple[Tensor, Tensor, Tensor]:
        layer, norms = self.layer, None
        if layer.qk_norm == "head":
            norms = Norms(self.q_norm, self.k_norm, layer.eps, layer.zero_centred)
        return prepared(rows, self.queries, layer.head_dim, norms, turn)

    def output(self, mixed: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.layer.gate:
            heads, _, _ = split(rows, self.queries, self.layer.head_dim)
            mixed = gated(mixed, heads[..., self.layer.head_dim :])
        return self.out_proj(mixed.flatten(-2))


def _zeros(full: Tensor, generator: torch.Generator) -> Tensor:
    return full.zero_()
