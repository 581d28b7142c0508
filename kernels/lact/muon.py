"""Muon's step of stacks of matrices: five Newton-Schulz iterations in batched products, and their backward pass.

    G = X X^T;   P = b G + c G^2;   X <- a X + P X

With D the gradient of the new X, that of the old one is a D + P D + Q X, where

    S = D X^T + X D^T;   Q = b S + c (S G + G S)

Sums of products are products of matrices that lie side by side: [P|Q] [D; X] = P D + Q X, [S|G] [G|S]^T = S G + G S.
So an iteration is three products forward and three backward. The backward pass computes X, G and P again.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_refine.kernels.fused import fused

# a, b, c (LaCT's, after Muon)
NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


class Iteration(NamedTuple):
    """What the backward pass of one iteration reads, of s matrices, and room for what it writes."""

    below: Tensor  # [s, 2 m, n]: room for D; X
    gram: Tensor  # [s, m, m], G
    beside: Tensor  # [s, m, 2 m]: P; room for Q

    def rows(self, index: slice) -> "Iteration":
        return Iteration(*(x[index] for x in self))


def newton_schulz(x: Tensor) -> Tensor:
    """Matrices [s, m, n], m <= n, of a Frobenius norm up to 1 -> those that they are led to: all singular values near
    1."""
    for a, b, c in NEWTON_SCHULZ:
        gram = torch.bmm(x, x.mT)
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return x


def iterations(parts: list[Tensor]) -> list[Iteration]:
    """Iterate on all matrices in the parts [s, m, n]; return the iterations as `newton_schulz_backward` takes them."""
    count, (rows, columns), first = sum(len(x) for x in parts), parts[0].shape[1:], parts[0]
    found: list[Iteration] = []
    for i, (_, b, c) in enumerate(NEWTON_SCHULZ):
        below = first.new_empty(count, 2 * rows, columns)
        x, beside = below[:, rows:], first.new_empty(count, rows, 2 * rows)
        if i:
            last, (a, *_) = found[-1], NEWTON_SCHULZ[i - 1]
            before = last.below[:, rows:]
            torch.baddbmm(before, last.beside[:, :, :rows], before, beta=a, out=x)
        else:
            torch.cat(parts, out=x)
        gram = torch.bmm(x, x.mT)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=beside[:, :, :rows])
        found.append(Iteration(below, gram, beside))
    return found


def newton_schulz_backward(kept: list[Iteration], grad: Tensor) -> Tensor:
    """Gradient [s, m, n] of the result -> that of x. Writes into `kept`."""
    rows = grad.shape[1]
    kept[-1].below[:, :rows] = grad
    for i in range(len(kept) - 1, -1, -1):
        a, b, c = NEWTON_SCHULZ[i]
        below, gram, beside = kept[i]
        grad = below[:, :rows]
        between = _between(torch.bmm(grad, below[:, rows:].mT), gram)
        left, right = between[:, :, : 2 * rows], between[:, :, rows:]
        torch.baddbmm(left[:, :, :rows], left, right.mT, beta=b, alpha=c, out=beside[:, :, rows:])
        room = kept[i - 1].below[:, :rows] if i else torch.empty_like(grad)
        torch.baddbmm(grad, beside, below, beta=a, out=room)
    return room


@fused
def _between(product: Tensor, gram: Tensor) -> Tensor:
    """D X^T and G -> [S|G|S]."""
    both = product + product.mT
    return torch.cat([both, gram, both], -1)
