"""Gated DeltaNet's sequence mixer on Megatron-Core: key heads, with their value heads, over tensor-parallel ranks.

Per key head and each of its value heads (facts of flash-linear-attention's GatedDeltaNet layer, arXiv 2412.06464):
    q, k, v = SiLU(conv4(x Wq)), SiLU(conv4(x Wk)), SiLU(conv4(x Wv));  q, k of unit length;  beta = sigmoid(x wb)
    g = -exp(A_log) softplus(x wa + dt_bias)        the log decay
    o = delta_rule(q, k, v, beta, g);  y = Wo (RMSNorm(o) SiLU(x Wg))
in_proj.weight holds, key head by key head, the rows [q | k | v | gate | a | beta], where v, gate, a and beta are those
of its value heads in turn; conv the channels [q | k | v]. A_log and dt_bias have a number a value head.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from megatron_refine.models.common.delta import DeltaMixer
from megatron_refine.models.gated_delta_net.config import GatedDeltaNetConfig
from megatron_refine.models.gated_delta_net.rule import gate_output, rule_inputs
from megatron_refine.models.mixer import sharded

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4  # of the initial decay, as in Mamba2
A_MIN, A_MAX = 1e-3, 16.0  # Mamba2 draws from 0, whose logarithm is not finite


class GatedDeltaNetMixer(DeltaMixer):
    """Built by a ModuleSpec with `model` in its params."""

    def __init__(self, config: Any, layer_number: int, model: GatedDeltaNetConfig, pg_collection: Any, **_: Any):
        self.shared = model.value_heads // model.num_heads  # value heads of a key head
        values = self.shared * model.head_dim_v
        self.widths = [model.head_dim, model.head_dim, values]
        self.other_widths = [values if model.use_gate else 0, self.shared, self.shared]  # gate, a, beta
        self.beta_range = 2.0 if model.allow_neg_eigval else 1.0
        super().__init__(
            config, layer_number, pg_collection, hidden=model.hidden_size, groups=model.num_heads,
            channels=sum(self.widths), others=sum(self.other_widths), heads=model.value_heads,
            value_dim=model.head_dim_v, conv_size=model.conv_size, eps=model.norm_eps,
        )  # fmt: skip
        self.A_log = sharded(torch.empty(self.heads, dtype=config.params_dtype), _initial_decay)
        self.dt_bias = sharded(torch.empty(self.heads, dtype=config.params_dtype), _initial_step)

    def own_parameters(self) -> dict[str, nn.Parameter]:
        return super().own_parameters() | {"A_log": self.A_log, "dt_bias": self.dt_bias}

    def rule_inputs(self, mixed: Tensor, others: Tensor) -> dict[str, Tensor]:
        q, k, v = mixed.split(self.widths, -1)
        a, b = (x.flatten(-2) for x in others[..., -2 * self.shared :].split(self.shared, -1))  # [N, m, H]
        v = v.unflatten(-1, (self.shared, -1)).flatten(-3, -2)
        return rule_inputs(q, k, v, a, b, self.mine(self.A_log), self.mine(self.dt_bias), self.beta_range)

    def mixed_columns(self, rows: Tensor) -> Tensor:
        """All but the gate."""
        return torch.cat([rows[..., : self.channels], rows[..., -2 * self.shared :]], -1)

    def output(self, mixed: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        normed = self.o_norm(mixed)
        gate = rows[..., self.channels : self.channels + self.other_widths[0]]
        if gate.shape[-1]:
            normed = gate_output(normed, gate.unflatten(-1, (self.shared, -1)).flatten(-3, -2))
        return self.out_proj(normed.to(rows.dtype).flatten(-2))


def _initial_decay(full: Tensor, generator: torch.Generator) -> Tensor:
    return full.uniform_(A_MIN, A_MAX, generator=generator).log_()


def _initial_step(full: Tensor, generator: torch.Generator) -> Tensor:
    """softplus(dt_bias) is log-uniform in [DT_MIN, DT_MAX]."""
    step = full.uniform_(math.log(DT_MIN), math.log(DT_MAX), generator=generator).exp_().clamp_(min=DT_FLOOR)
    return step.add_(torch.log(-torch.expm1(-step)))
