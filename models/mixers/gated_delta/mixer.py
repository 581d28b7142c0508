"""Gated DeltaNet's sequence mixer on Megatron-Core: key heads, with their value heads, over tensor-parallel ranks.

Per key head and each of its value heads (facts of flash-linear-attention's GatedDeltaNet layer, arXiv 2412.06464):
    q, k, v = SiLU(conv4(x Wq)), SiLU(conv4(x Wk)), SiLU(conv4(x Wv));  q, k of unit length;  beta = sigmoid(x wb)
    g = -exp(A_log) softplus(x wa + dt_bias)        the log decay
    o = delta_rule(q, k, v, beta, g);  y = Wo (RMSNorm(o) SiLU(x Wg))
in_proj.weight holds, key head by key head, the rows [q | k | v | gate | a | beta], where v, gate, a and beta are those
of its value heads in turn; conv the channels [q | k | v]. A_log and dt_bias have a number a value head.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_refine.models.mixer import sharded
from megatron_refine.models.mixers.delta.mixer import DeltaMixer
from megatron_refine.models.mixers.gated_delta import GatedDelta
from megatron_refine.models.mixers.gated_delta.rule import gate_output, gates

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4  # of the initial decay, as in Mamba2
A_MIN, A_MAX = 1e-3, 16.0  # Mamba2 draws from 0, whose logarithm is not finite


class GatedDeltaMixer(DeltaMixer):
    """Built by a ModuleSpec with `model` in its params."""

    def __init__(self, config: Any, layer_number: int, model: GatedDelta, pg_collection: Any, **_: Any):
        self.shared = model.value_heads // model.num_heads  # value heads of a key head
        values = self.shared * model.head_dim_v
        self.beta_range = 2.0 if model.allow_neg_eigval else 1.0
        super().__init__(
            config, layer_number, pg_collection, hidden=model.hidden_size, groups=model.num_heads,
            key_dim=model.head_dim, channels=2 * model.head_dim + values,
            others=[values if model.use_gate else 0, self.shared, self.shared],  # gate, a, beta
            heads=model.value_heads, value_dim=model.head_dim_v, conv_size=model.conv_size, eps=model.norm_eps,
        )  # fmt: skip
        self.A_log = sharded(torch.empty(self.heads, dtype=config.params_dtype), _initial_decay)
        self.dt_bias = sharded(torch.empty(self.heads, dtype=config.params_dtype), _initial_step)

    def own_parameters(self) -> dict[str, nn.Parameter]:
        return super().own_parameters() | {"A_log": self.A_log, "dt_bias": self.dt_bias}

    def rule_inputs(self, q: Tensor, k: Tensor, v: Tensor, others: Sequence[Tensor]) -> dict[str, Tensor]:
        a, b = (x.flatten(-2) for x in others[1:])  # [N, m, H]
        beta, g = gates(a, b, self.mine(self.A_log), self.mine(self.dt_bias), self.beta_range)
        return {"q": q, "k": k, "v": v.reshape(*beta.shape, -1), "beta": beta, "g": g}

    def mixed_columns(self, rows: Tensor) -> Tensor:
        """All but the gate."""
        return torch.cat([rows[..., : self.channels], rows[..., -2 * self.shared :]], -1)

    def read_out(self, o: Tensor, others: Sequence[Tensor]) -> Tensor:
        """Normed and gated where the gate came with the rows."""
        gate = others[0]
        if not gate.shape[-1]:
            return o
        return gate_output(o, self.o_norm.weight, self.o_norm.eps, gate).to(gate.dtype)

    def output(self, mixed: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        width = self.others[0]
        if not width:
            return super().output(mixed, rows)
        if self.cp_group.size() > 1:  # the gate stayed here
            gate = rows[..., self.channels : self.channels + width]
            mixed = gate_output(mixed, self.o_norm.weight, self.o_norm.eps, gate).to(rows.dtype)
        return self.out_proj(mixed.flatten(-2))


def _initial_decay(full: Tensor, generator: torch.Generator) -> Tensor:
    return full.uniform_(A_MIN, A_MAX, generator=generator).log_()


def _initial_step(full: Tensor, generator: torch.Generator) -> Tensor:
    """softplus(dt_bias) is log-uniform in [DT_MIN, DT_MAX]."""
    step = full.uniform_(math.log(DT_MIN), math.log(DT_MAX), generator=generator).exp_().clamp_(min=DT_FLOOR)
    return step.add_(torch.log(-torch.expm1(-step)))
