"""LaCT's fast weights token by token: slow, obvious, the truth that the chunked path is held to (arXiv 2505.23884)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_refine.kernels.lact import Rule

Fast = tuple[Tensor, Tensor, Tensor]
"""W0 [H, I, D], W1 [H, D, I], W2 [H, I, D]."""

NEWTON_SCHULZ = [
    (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]  # fmt: skip


def recurrent_lact(
    initial: Fast, q: Tensor, k: Tensor, v: Tensor, rates: Tensor, momentum: Tensor | None, rule: Rule
) -> Tensor:
    """One sequence: q, k, v [T, H, D], rates [T, H, 3], momentum [T, H] -> what each token reads [T, H, D].

    f_W(z) = W1 (SiLU(W0 z) * (W2 z)). Each token reads f_W(q), then adds its step d<f_W(k), v>/dW times its rates to
    the chunk's step. At the end of a chunk: M <- step + m M, with m the chunk's mean momentum; W <- W + M (Muon: plus
    the nearest semi-orthogonal matrix of M), each row scaled to its initial length. Differentiable: the step is taken
    by autograd itself.
    """
    weights, total = initial, initial
    moved: list[Tensor] = [torch.zeros_like(w) for w in initial]
    step, kept, outputs = [torch.zeros_like(w) for w in initial], [], []
    for t in range(q.shape[0]):
        outputs.append(_read(weights, q[t]))
        w0, w1, w2 = (w if w.requires_grad else w.detach().requires_grad_() for w in weights)
        leaves = (w0, w1, w2)
        agreement = (_read(leaves, k[t]) * v[t]).sum()
        slopes = torch.autograd.grad(agreement, leaves, create_graph=True)
        step = [s + g * rates[t, :, i, None, None] for i, (s, g) in enumerate(zip(step, slopes, strict=True))]
        kept.append(torch.zeros_like(rates[t, :, 0]) if momentum is None else momentum[t])
        if (t + 1) % rule.chunk == 0:
            mean = torch.stack(kept).mean(0)[:, None, None]
            moved = [s + m * mean for s, m in zip(step, moved, strict=True)]
            taken = [_newton_schulz(m) for m in moved] if rule.muon else moved
            total = tuple(w + s for w, s in zip(total, taken, strict=True))  # type: ignore[assignment]
            weights = tuple(_like(w, w0) for w, w0 in zip(total, initial, strict=True))  # type: ignore[assignment]
            if not rule.prenorm:
                total = weights
            step, kept = [torch.zeros_like(w) for w in initial], []
    return torch.stack(outputs)


def _read(weights: Fast, z: Tensor) -> Tensor:
    """[H, D] -> [H, D]."""
    w0, w1, w2 = weights
    hidden = F.silu(torch.einsum("hid,hd->hi", w0, z)) * torch.einsum("hid,hd->hi", w2, z)
    return torch.einsum("hdi,hi->hd", w1, hidden)


def _like(w: Tensor, initial: Tensor) -> Tensor:
    return w / (w.norm(dim=-1, keepdim=True) + 1e-5) * initial.norm(dim=-1, keepdim=True)


def _newton_schulz(g: Tensor) -> Tensor:
    heads = []
    for x in g:
        x = x / (x.norm() + 1e-7)
        tall = x.shape[0] > x.shape[1]
        x = x.T if tall else x
        for a, b, c in NEWTON_SCHULZ:
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        heads.append(x.T if tall else x)
    return torch.stack(heads)
