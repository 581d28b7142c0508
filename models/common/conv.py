"""The short causal convolution in front of q, k and v."""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_refine.kernels.fused import fused


@fused
def short_conv(x: Tensor, weight: Tensor, tail: Tensor | None = None) -> Tensor:
    """SiLU of a causal depthwise convolution.

    Args: x [N, T, *channels]; weight [*channels, W], the last tap on the current token; tail [N, W-1, *channels], the
    rows before x (None: zeros).
    Returns: [N, T, *channels].
    """
    length, width = x.shape[1], weight.shape[-1]
    if tail is None:
        tail = x.new_zeros(x.shape[0], width - 1, *x.shape[2:])
    rows = torch.cat([tail, x], 1)
    y = x * weight[..., -1]
    for tap in range(width - 1):  # a sum of shifted rows beats conv1d with groups = D on CPU, forward and backward
        y = torch.addcmul(y, rows[:, tap : tap + length], weight[..., tap])
    return F.silu(y)
