"""What Gated DeltaNet gives the delta rule, in training and in serving."""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_refine.kernels.delta_rule import l2_normalize
from megatron_refine.kernels.fused import fused


@fused
def rule_inputs(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, beta_range: float
) -> dict[str, Tensor]:
    """q, k [N, m, G, K] of the key heads and v [N, m, H, V] of the value heads after the convolution, a, b [N, m, H],
    A_log, dt_bias [H] -> arguments of `delta_rule`.

    g = -exp(A_log) softplus(a + dt_bias);  beta = beta_range * sigmoid(b).
    """
    dtype = torch.promote_types(a.dtype, torch.float32)
    g = -A_log.to(dtype).exp() * F.softplus(a.to(dtype) + dt_bias.to(dtype))
    return {"q": l2_normalize(q), "k": l2_normalize(k), "v": v, "beta": b.to(dtype).sigmoid() * beta_range, "g": g}


@fused
def gate_output(normed: Tensor, gate: Tensor) -> Tensor:
    """Normed outputs times SiLU of the gate, both [..., H, V]."""
    return normed * F.silu(gate.to(normed.dtype))
