"""DeltaNet's sequence mixer on Megatron-Core: heads over tensor-parallel ranks, complete rows inside.

Per head (facts of flash-linear-attention's DeltaNet layer, arXiv 2406.06484):
    q, k, v = SiLU(conv4(x Wq)), SiLU(conv4(x Wk)), SiLU(conv4(x Wv));  q, k of unit length;  beta = sigmoid(x wb)
    o = delta_rule(q, k, v, beta);  y = Wo RMSNorm(o)
in_proj.weight holds, head by head, the rows [q | k | v | beta]; conv the channels [q | k | v].
"""

from typing import Any

from torch import Tensor

from megatron_refine.models.common.delta import DeltaMixer
from megatron_refine.models.delta_net.config import DeltaNetConfig
from megatron_refine.models.delta_net.rule import rule_inputs


class DeltaNetMixer(DeltaMixer):
    """Built by a ModuleSpec with `model` in its params."""

    def __init__(self, config: Any, layer_number: int, model: DeltaNetConfig, pg_collection: Any, **_: Any):
        self.widths = [model.head_dim_k, model.head_dim_k, model.head_dim_v]
        self.beta_range = 2.0 if model.allow_neg_eigval else 1.0
        super().__init__(
            config, layer_number, pg_collection, hidden=model.hidden_size, groups=model.num_heads,
            channels=sum(self.widths), others=1, heads=model.num_heads, value_dim=model.head_dim_v,
            conv_size=model.conv_size, eps=model.norm_eps,
        )  # fmt: skip

    def rule_inputs(self, mixed: Tensor, others: Tensor) -> dict[str, Tensor]:
        q, k, v = mixed.split(self.widths, -1)
        return rule_inputs(q, k, v, others[..., 0], self.beta_range)
