"""DeltaNet's sequence mixer on Megatron-Core: heads over tensor-parallel ranks, complete rows inside.

Per head (facts of flash-linear-attention's DeltaNet layer, arXiv 2406.06484):
    q, k, v = SiLU(conv4(x Wq)), SiLU(conv4(x Wk)), SiLU(conv4(x Wv));  q, k of unit length;  beta = sigmoid(x wb)
    o = delta_rule(q, k, v, beta);  y = Wo RMSNorm(o)
in_proj.weight holds, head by head, the rows [q | k | v | beta]; conv the channels [q | k | v].
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from megatron_refine.models.delta_net.config import DeltaNetConfig
from megatron_refine.models.delta_net.rule import write_strength
from megatron_refine.models.mixers.delta.mixer import DeltaMixer


class DeltaNetMixer(DeltaMixer):
    """Built by a ModuleSpec with `model` in its params."""

    def __init__(self, config: Any, layer_number: int, model: DeltaNetConfig, pg_collection: Any, **_: Any):
        self.beta_range = 2.0 if model.allow_neg_eigval else 1.0
        super().__init__(
            config, layer_number, pg_collection, hidden=model.hidden_size, groups=model.num_heads,
            key_dim=model.head_dim_k, channels=2 * model.head_dim_k + model.head_dim_v, others=[1],
            heads=model.num_heads, value_dim=model.head_dim_v, conv_size=model.conv_size, eps=model.norm_eps,
        )  # fmt: skip

    def rule_inputs(self, q: Tensor, k: Tensor, v: Tensor, others: Sequence[Tensor]) -> dict[str, Tensor]:
        return {"q": q, "k": k, "v": v, "beta": write_strength(others[0][..., 0], self.beta_range)}
