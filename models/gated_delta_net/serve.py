"""Gated DeltaNet for SGLang. See models/mixers/delta/serve.py."""

from typing import Any

from torch import Tensor

from megatron_refine.models.gated_delta_net.config import GatedDeltaNetConfig
from megatron_refine.models.mixers.delta.serve import (
    Decoder,
    DeltaAttention,
    ForCausalLM,
    Ragged,
    column,
    sharded_parameter,
)
from megatron_refine.models.mixers.gated_delta.rule import gate_output, gates


class GatedDeltaNetAttention(DeltaAttention):
    """Adds the write strength, the decay and the output gate."""

    def __init__(self, model: GatedDeltaNetConfig, layer: int):
        super().__init__(model, model.state_shape, layer)
        self.beta_range = 2.0 if model.allow_neg_eigval else 1.0
        hidden, heads = model.hidden_size, model.value_heads
        self.a_proj, self.b_proj = column(hidden, heads), column(hidden, heads)
        self.A_log, self.dt_bias = sharded_parameter(heads), sharded_parameter(heads)
        self.g_proj = column(hidden, heads * model.head_dim_v) if model.use_gate else None

    def rule_inputs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, ragged: Ragged) -> dict[str, Tensor]:
        a, b = (ragged.batch(project(x)[0]) for project in (self.a_proj, self.b_proj))
        beta, g = gates(a, b, self.A_log, self.dt_bias, self.beta_range)
        return {"q": q, "k": k, "v": v, "beta": beta, "g": g}

    def read_out(self, x: Tensor, o: Tensor) -> Tensor:
        if self.g_proj is None:
            return super().read_out(x, o)
        return gate_output(o, self.o_norm.weight, self.o_norm.eps, self.g_proj(x)[0])


class GatedDeltaNetForCausalLM(ForCausalLM):
    def decoder(self, model: Any) -> Decoder:
        return Decoder(model, GatedDeltaNetAttention)


MODEL = GatedDeltaNetForCausalLM
