"""What DeltaNet gives the delta rule, in training and in serving."""

import torch
from torch import Tensor

from megatron_refine.kernels.fused import fused


@fused
def write_strength(b: Tensor, beta_range: float) -> Tensor:
    """beta = beta_range * sigmoid(b), in at least fp32: [N, m, H] -> [N, m, H]."""
    return b.to(torch.promote_types(b.dtype, torch.float32)).sigmoid() * beta_range
