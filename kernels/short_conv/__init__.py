"""What stands before the delta rule: a short causal convolution, SiLU, and the unit length of queries and keys.

One op, and the one place that chooses its kernel.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_refine.kernels.delta_rule import l2_normalize
from megatron_refine.kernels.fused import fused
from megatron_refine.platform.hardware import on_gpu


def convolved(
    rows: Tensor, weight: Tensor, tail: Tensor | None, keys: int, others: Sequence[int]
) -> tuple[Tensor, ...]:
    """Columns of G groups -> inputs of the delta rule.

    Args: rows [N, T, G, *], of which the first C columns are convolved: `keys` of queries, `keys` of keys, the values;
    `others`: the widths of what follows; weight [G, C, W], the last tap on the current token; tail [N, W-1, G, C], the
    rows before (None: zeros).
    Returns: q, k [N, T, G, K] of unit length, v [N, T, G, V], and the other columns as they are. On a GPU a Triton
    kernel computes it, and q and k are in the precision of the rows; here they are in at least fp32.
    """
    if on_gpu(rows) and rows.dtype != torch.float64:
        from megatron_refine.kernels.short_conv.gpu import gpu_convolved

        return gpu_convolved(rows, weight, tail, keys, others)
    channels = weight.shape[1]
    before, *rest = rows.split([channels, *others], -1)
    q, k, v = short_conv(before, weight, tail).split([keys, keys, channels - 2 * keys], -1)
    return l2_normalize(q), l2_normalize(k), v, *rest


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
