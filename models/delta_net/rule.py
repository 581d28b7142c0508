"""What DeltaNet gives the delta rule, in training and in serving."""

import torch
from torch import Tensor

from megatron_refine.kernels.delta_rule import l2_normalize
from megatron_refine.kernels.fused import fused


@fused
def rule_inputs(q: Tensor, k: Tensor, v: Tensor, b: Tensor, beta_range: float) -> dict[str, Tensor]:
    """q, k [N, m, H, K] and v [N, m, H, V] after the convolution, b [N, m, H] -> arguments of `delta_rule`.

    beta = beta_range * sigmoid(b).
    """
    beta = b.to(torch.promote_types(b.dtype, torch.float32)).sigmoid() * beta_range
    return {"q": l2_normalize(q), "k": l2_normalize(k), "v": v, "beta": beta}
