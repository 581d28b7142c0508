"""DeltaNet for SGLang. See models/mixers/delta/serve.py."""

from typing import Any

from torch import Tensor

from megatron_refine.models.delta_net.config import DeltaNetConfig
from megatron_refine.models.delta_net.rule import write_strength
from megatron_refine.models.mixers.delta.serve import (
    Decoder,
    DeltaAttention,
    ForCausalLM,
    Ragged,
    column,
)


class DeltaNetAttention(DeltaAttention):
    """Adds the write strength."""

    def __init__(self, model: DeltaNetConfig, layer: int):
        super().__init__(model, model.state_shape, layer)
        self.beta_range = 2.0 if model.allow_neg_eigval else 1.0
        self.b_proj = column(model.hidden_size, model.num_heads)

    def rule_inputs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, ragged: Ragged) -> dict[str, Tensor]:
        return {"q": q, "k": k, "v": v, "beta": write_strength(ragged.batch(self.b_proj(x)[0]), self.beta_range)}


class DeltaNetForCausalLM(ForCausalLM):
    def decoder(self, model: Any) -> Decoder:
        return Decoder(model, DeltaNetAttention)


MODEL = DeltaNetForCausalLM
