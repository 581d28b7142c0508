"""RMS norm that works under sequence parallelism without Transformer Engine or apex (Megatron's own refuses)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, statistics in at least fp32. Built by Megatron's layer specs."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.config, self.eps = config, eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # a norm of sequence shards has partial gradients: Megatron's finalize_model_grads sums them over tp by this
        # mark
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        marked = self.weight.sequence_parallel  # type: ignore[attr-defined]
        if marked and not self.config.sequence_parallel and torch.is_grad_enabled():
            # a pass over whole rows: every rank has the whole gradient, and the sum over tp is still to come
            weight = weight.view_as(weight)
            weight.register_hook(lambda grad: grad / self.config.tensor_model_parallel_size)
        return self._normed(x, weight)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.eps)


class ZeroCentredNorm(RMSNorm):
    """x / rms(x) * (1 + weight), all of it in at least fp32."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **more: Any):
        super().__init__(config, hidden_size, eps, **more)
        self.weight.initialize = lambda full, generator: full.zero_()  # type: ignore[attr-defined]

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        high = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(high), weight.shape, 1 + weight.to(high), self.eps).to(x.dtype)


class HeadNorm(RMSNorm):
    """The norm of each head's output: one weight shared by all heads, hence replicated, but fed this rank's heads only.

    Its gradient is partial over tp whether sequence parallelism is on or off; Megatron sums only what it knows by name,
    so the optimizer sums every parameter marked `tp_partial` (trainer/gradients.py).
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5):
        super().__init__(config, hidden_size, eps)
        self.weight.sequence_parallel = False  # type: ignore[attr-defined]
        self.weight.tp_partial = True  # type: ignore[attr-defined]
