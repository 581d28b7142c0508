"""What Gated DeltaNet gives the delta rule and makes of its output, in training and in serving."""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_refine.kernels.fused import fused


@fused
def gates(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, beta_range: float) -> tuple[Tensor, Tensor]:
    """a, b [N, m, H], A_log, dt_bias [H] -> beta, g [N, m, H] of the delta rule, in at least fp32.

    beta = beta_range * sigmoid(b);  g = -exp(A_log) softplus(a + dt_bias).
    """
    dtype = torch.promote_types(a.dtype, torch.float32)
    g = -A_log.to(dtype).exp() * F.softplus(a.to(dtype) + dt_bias.to(dtype))
    return b.to(dtype).sigmoid() * beta_range, g


@fused
def gate_output(o: Tensor, weight: Tensor, eps: float, gate: Tensor) -> Tensor:
    """Outputs of the delta rule [..., H, V], normed, times SiLU of the gate, of as many columns."""
    normed = F.rms_norm(o, weight.shape, weight, eps)
    return normed * F.silu(gate.reshape(normed.shape).to(normed.dtype))
