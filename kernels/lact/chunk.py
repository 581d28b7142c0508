"""LaCT's fast weights (arXiv 2505.23884) a chunk at a time: read with the weights as they are, then update them.

A head's memory is a gated MLP, f_W(z) = W1 (SiLU(W0 z) * (W2 z)), whose three matrices take one step of gradient ascent
on sum <f_W(k), v> at the end of each chunk:

    G_i = sum_t rate_i(t) d<f_W(k_t), v_t>/dW_i
    M <- G + m M            m: the chunk's mean momentum
    W <- rows(W + M)        rows() restores each row's first length; Muon: adds M's nearest
                            semi-orthogonal matrix instead of M

What makes branches cheap: within a chunk the weights do not change, and G is a sum over tokens. So a branch reads the
weights of the chunk it starts in, and one that crosses the chunk's end adds its own tokens to those of the main stream.
A token whose rates are 0 leaves no trace.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_refine.kernels.fused import fused
from megatron_refine.platform import on_gpu

Fast = tuple[Tensor, Tensor, Tensor]
"""W0 [..., H, I, D], W1 [..., H, D, I], W2 [..., H, I, D], or what is shaped like them."""

ROW_EPS, FROBENIUS_EPS = 1e-5, 1e-7
# coefficients of five Newton-Schulz steps (LaCT's, after Muon)
NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


@dataclass(frozen=True)
class Rule:
    chunk: int  # tokens between updates
    muon: bool = False
    prenorm: bool = False  # steps add up before the rows are scaled, not after


@dataclass(frozen=True)
class Weights:
    """Fast weights as a chunk finds them, of N sequences; at least fp32."""

    used: Fast  # read, and where gradients are taken
    total: Fast  # before their rows were scaled (prenorm), else the same as `used`
    moved: Fast  # M

    def detach(self) -> "Weights":
        return Weights(*((w[0].detach(), w[1].detach(), w[2].detach()) for w in (self.used, self.total, self.moved)))

    def rows(self, index: slice) -> "Weights":
        return Weights(*((w[0][index], w[1][index], w[2][index]) for w in (self.used, self.total, self.moved)))


@dataclass(frozen=True)
class Tokens:
    """What the update needs of tokens: k, v [N, t, H, D], rates [N, t, H, 3], momentum [N, t, H] or None."""

    k: Tensor
    v: Tensor
    rates: Tensor
    momentum: Tensor | None

    def split(self, size: int) -> list["Tokens"]:
        momentum = [None] * -(-self.k.shape[1] // size) if self.momentum is None else self.momentum.split(size, 1)
        parts = zip(*(x.split(size, 1) for x in (self.k, self.v, self.rates)), momentum, strict=True)
        return [Tokens(*part) for part in parts]

    def part(self, rows: slice, tokens: slice) -> "Tokens":
        return Tokens(*(None if x is None else x[rows, tokens] for x in vars(self).values()))  # type: ignore[arg-type]

    def detach(self) -> "Tokens":
        return Tokens(*(None if x is None else x.detach() for x in vars(self).values()))  # type: ignore[arg-type]

    def repeat(self, n: int) -> "Tokens":
        parts = (None if x is None else x.repeat_interleave(n, 0) for x in vars(self).values())
        return Tokens(*parts)  # type: ignore[arg-type]


def join(parts: list[Tokens]) -> Tokens:
    """Tokens one after the other."""
    columns = zip(*(vars(p).values() for p in parts), strict=True)
    return Tokens(*(None if c[0] is None else torch.cat(c, 1) for c in columns))  # type: ignore[arg-type]


def chunk_lact(initial: Fast, q: Tensor, tokens: Tokens, rule: Rule) -> tuple[Tensor, list[Weights], list[Tokens]]:
    """Same maths as `recurrent_lact`.

    Args: initial weights of H heads; q [N, T, H, D].
    Returns: what each token reads [N, T, H, D]; the weights at the start of each chunk; the tokens by chunk. The
    weights after a last chunk that is full are not computed: no token reads them.
    """
    chunks = tokens.split(rule.chunk)
    weights, outputs = [start(initial, q.shape[0])], []
    for i, (queries, chunk) in enumerate(zip(q.split(rule.chunk, 1), chunks, strict=True)):
        outputs.append(read(weights[-1].used, queries))
        if i + 1 < len(chunks):
            weights.append(after(weights[-1], chunk, initial, rule))
    return torch.cat(outputs, 1), weights, chunks


def start(initial: Fast, count: int) -> Weights:
    """The weights of `count` sequences before their first chunk."""
    dtype = torch.promote_types(initial[0].dtype, torch.float32)
    w0, w1, w2 = (w.to(dtype).expand(count, *w.shape) for w in initial)
    still = (torch.zeros_like(w0), torch.zeros_like(w1), torch.zeros_like(w2))
    return Weights((w0, w1, w2), (w0, w1, w2), still)


def after(weights: Weights, tokens: Tokens, initial: Fast, rule: Rule) -> Weights:
    """The weights after a chunk of these tokens."""
    steps = gradient(weights.used, tokens)
    if tokens.momentum is not None:
        kept = tokens.momentum.to(steps[0].dtype).mean(1)[..., None, None]
        steps = tuple(g + kept * m for g, m in zip(steps, weights.moved, strict=True))  # type: ignore[assignment]
    low = tokens.k.dtype if on_gpu(tokens.k) else steps[0].dtype  # as the official code, where it pays
    taken = tuple(orthogonal(m, low) for m in steps) if rule.muon else steps
    t0, t1, t2 = (w + s for w, s in zip(weights.total, taken, strict=True))
    u0, u1, u2 = (_scale_rows(t, w) for t, w in zip((t0, t1, t2), initial, strict=True))
    used = (u0, u1, u2)
    return Weights(used, (t0, t1, t2) if rule.prenorm else used, steps)


def read(weights: Fast, q: Tensor) -> Tensor:
    """f_W(q), shaped as q [N, t, H, D]; weights [P, H, ...], P dividing N: each serves N/P consecutive sequences."""
    w0, w1, w2 = (w.to(q.dtype) for w in weights)
    z = _fold(q, w0.shape[0])
    return _unfold(_gated(z @ w0.mT, z @ w2.mT) @ w1.mT, q.shape[0])


@fused
def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def gradient(weights: Fast, tokens: Tokens) -> Fast:
    """G of the tokens, in at least fp32: weights [N, H, ...] -> the same shapes."""
    k, v, rates = tokens.k.transpose(1, 2), tokens.v.transpose(1, 2), tokens.rates.transpose(1, 2)  # [N, H, t, *]
    w0, w1, w2 = (w.to(k.dtype) for w in weights)
    # v W1 is d<f(k), v> / d hidden
    into_gate, hidden, into_up, k0, k2 = _weighted(k @ w0.mT, k @ w2.mT, v @ w1, k, rates.to(k.dtype))
    found = (into_gate.mT @ k0, v.mT @ hidden, into_up.mT @ k2)
    g0, g1, g2 = (g.to(torch.promote_types(g.dtype, torch.float32)) for g in found)
    return g0, g1, g2


@fused
def _weighted(gate: Tensor, up: Tensor, into: Tensor, k: Tensor, rates: Tensor) -> tuple[Tensor, ...]:
    """d/d gate, the hidden rows times rate 1, d/d up, and keys times rates 0 and 2: the sides of G's three products."""
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    into_gate = into * up * sigmoid * (1 + gate * (1 - sigmoid))
    rate0, rate1, rate2 = rates.split(1, -1)
    return into_gate, silu * up * rate1, into * silu, k * rate0, k * rate2


def orthogonal(g: Tensor, dtype: torch.dtype) -> Tensor:
    """Muon's step: five Newton-Schulz iterations in `dtype` towards the nearest semi-orthogonal matrix, [..., m, n]."""
    x = g.to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + FROBENIUS_EPS)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for a, b, c in NEWTON_SCHULZ:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(g.dtype)


def _scale_rows(w: Tensor, initial: Tensor) -> Tensor:
    return w / (w.norm(dim=-1, keepdim=True) + ROW_EPS) * initial.to(w.dtype).norm(dim=-1, keepdim=True)


def _fold(q: Tensor, states: int) -> Tensor:
    """[N, t, H, D] -> [P, H, N/P * t, D]."""
    return q.unflatten(0, (states, -1)).flatten(1, 2).transpose(1, 2)


def _unfold(x: Tensor, sequences: int) -> Tensor:
    """[P, H, N/P * t, D] -> [N, t, H, D]."""
    return x.transpose(1, 2).unflatten(1, (sequences // x.shape[0], -1)).flatten(0, 1)
