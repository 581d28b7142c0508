"""What a Gated DeltaNet costs."""

from megatron_refine.models.common.delta_cost import DeltaCost, DeltaShape
from megatron_refine.models.gated_delta_net.config import GatedDeltaNetConfig


def _shape(model: GatedDeltaNetConfig) -> DeltaShape:
    heads, k, v = model.value_heads, model.head_dim, model.head_dim_v
    return DeltaShape(
        heads,
        k,
        v,
        channels=2 * model.num_heads * k + heads * v,
        others=heads * (2 + v * model.use_gate),
        conv_size=model.conv_size,
        vectors=2 * heads,
        gated_rule=True,
        gated_output=model.use_gate,
    )


_cost = DeltaCost(_shape)
parameters, rank_parameters = _cost.parameters, _cost.rank_parameters
layer_flops, fork_flops, head_flops = _cost.layer_flops, _cost.fork_flops, _cost.head_flops
state_bytes, saved_bytes = _cost.state_bytes, _cost.saved_bytes
exchanged_columns, head_norm_width = _cost.exchanged_columns, _cost.head_norm_width
handle_bytes, delta_rule = _cost.handle_bytes, _cost.shape
