"""What a DeltaNet costs."""

from megatron_refine.models.common.delta_cost import DeltaCost, DeltaShape
from megatron_refine.models.delta_net.config import DeltaNetConfig


def _shape(model: DeltaNetConfig) -> DeltaShape:
    heads, k, v = model.num_heads, model.head_dim_k, model.head_dim_v
    return DeltaShape(heads, k, v, channels=heads * (2 * k + v), others=heads, conv_size=model.conv_size)


_cost = DeltaCost(_shape)
parameters, rank_parameters = _cost.parameters, _cost.rank_parameters
layer_flops, fork_flops, head_flops = _cost.layer_flops, _cost.fork_flops, _cost.head_flops
state_bytes, saved_bytes = _cost.state_bytes, _cost.saved_bytes
exchanged_columns, head_norm_width = _cost.exchanged_columns, _cost.head_norm_width
handle_bytes, delta_rule = _cost.handle_bytes, _cost.shape
