"""LaCT evaluated from tensors in Hugging Face's format (arXiv 2505.23884; the lact_llm layer): token by token maths.

Two paths share q, k and v: softmax attention over a window, and a gated MLP a head whose weights W0, W1, W2 are
trained, within the sequence, on each chunk after it was read.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_refine.models.common.reference import Weights, decoder_logits, rms_norm
from megatron_refine.models.lact.config import LactConfig

NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)  # fmt: skip
LR_BASE = 0.001
IDENTITY = 0.5  # of the initial W0 and W2 beside their low-rank part
NORM_EPS = 1e-5  # of ttt_norm, whatever norm_eps is, and of the unit lengths
Fast = tuple[Tensor, Tensor, Tensor]  # W0, W1, W2, or what is shaped as they: [B, H, out, in]


def logits(model: LactConfig, weights: Weights, tokens: Tensor) -> Tensor:
    """tokens [B, T] -> logits [B, T, vocab]."""
    return decoder_logits(model, weights, tokens, _mixer)


def _mixer(model: LactConfig, weights: Weights, prefix: str, x: Tensor) -> Tensor:
    qkv = x @ weights[prefix + "qkv.weight"].T
    q, k, v = (qkv + weights[prefix + "qkv.bias"] if model.qkv_bias else qkv).chunk(3, -1)
    fast = _fast_path(model, weights, prefix, x, q, k, v)
    return (_window_attention(model, q, k, v) + fast) @ weights[prefix + "o_proj.weight"].T


def _window_attention(model: LactConfig, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, T, hidden] each -> [B, T, hidden]; a token sees itself and the window_size - 1 before it."""
    q, k, v = (z.unflatten(-1, (model.num_attn_heads, -1)) for z in (q, k, v))
    q, k = _rope(q, model.rope_theta), _rope(k, model.rope_theta)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    ago = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
    scores = scores.masked_fill((ago < 0) | (ago >= model.window_size), -math.inf)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(-2)


def _fast_path(model: LactConfig, weights: Weights, prefix: str, x: Tensor, *qkv: Tensor) -> Tensor:
    """x and q, k, v [B, T, hidden] -> [B, T, hidden]."""

    def affine(part: str) -> Tensor:
        return x @ weights[f"{prefix}{part}.weight"].T + weights[f"{prefix}{part}.bias"]

    scale, offset = weights[prefix + "qk_scale"], weights[prefix + "qk_offset"]
    q, k = (_fast_heads(model, z * scale[:, i] + offset[:, i]) for i, z in enumerate(qkv[:2]))
    v = F.silu(qkv[2]) if model.qkv_silu and not model.no_v_silu else qkv[2]
    v = v.unflatten(-1, (model.num_lact_heads, -1))
    base = LR_BASE + math.log(-math.expm1(-LR_BASE))  # the inverse of softplus
    rates = F.softplus(affine("lr_proj") + base).unflatten(-1, (model.num_lact_heads, 3))
    momentum = affine("momentum_proj.0").sigmoid() if model.use_momentum else torch.zeros_like(rates[..., 0])
    read = _read_and_train(model, _initial(model, weights, prefix), q, k, v, rates, momentum)
    read = rms_norm(read, weights[prefix + "ttt_norm.weight"], NORM_EPS)
    if model.learnable_ttt_scale:
        read = read * F.silu(affine("ttt_scale_proj"))[..., None]
    return read.flatten(-2)


def _fast_heads(model: LactConfig, z: Tensor) -> Tensor:
    """[B, T, hidden] -> [B, T, H, d]: of unit length a fast-weight head, then turned by position an attention head."""
    z = F.silu(z) if model.qkv_silu else z
    z = z.unflatten(-1, (model.num_lact_heads, -1))
    z = z / (z.norm(dim=-1, keepdim=True) + NORM_EPS)
    if model.ttt_nope:
        return z
    turned = _rope(z.flatten(-2).unflatten(-1, (model.num_attn_heads, -1)), model.rope_theta)
    return turned.flatten(-2).unflatten(-1, (model.num_lact_heads, -1))


def _initial(model: LactConfig, weights: Weights, prefix: str) -> Fast:
    """[H, out, in] each; W0 and W2 are whole, or a low-rank product and a multiple of the identity."""
    w1 = weights[prefix + "w1"]
    if model.w0_w2_low_rank <= 0:
        return weights[prefix + "w0"], w1, weights[prefix + "w2"]
    identity = IDENTITY * torch.eye(w1.shape[2], w1.shape[1], dtype=w1.dtype)
    low = [weights[f"{prefix}{n}.w_left"] @ weights[f"{prefix}{n}.w_right"] + identity for n in ("w0", "w2")]
    return low[0], w1, low[1]


def _read_and_train(
    model: LactConfig, initial: Fast, q: Tensor, k: Tensor, v: Tensor, rates: Tensor, momentum: Tensor
) -> Tensor:
    """q, k, v [B, T, H, d], rates [B, T, H, 3], momentum [B, T, H] -> what each token reads [B, T, H, d]."""
    fast: Fast = tuple(w.expand(q.shape[0], *w.shape) for w in initial)  # type: ignore[assignment]
    total = fast  # before the rows were scaled, where steps add up to that (prenorm)
    moved: Fast = tuple(torch.zeros_like(w) for w in fast)  # type: ignore[assignment]
    outputs = []
    for start in range(0, q.shape[1], model.lact_chunk_size):
        chunk = slice(start, start + model.lact_chunk_size)
        outputs.append(_apply(fast, q[:, chunk]))
        if start + model.lact_chunk_size < q.shape[1]:
            gradient = _gradient(fast, k[:, chunk], v[:, chunk], rates[:, chunk])
            kept = momentum[:, chunk].mean(1)[..., None, None]
            moved = tuple(g + m * kept for g, m in zip(gradient, moved, strict=True))  # type: ignore[assignment]
            step = tuple(_orthogonal(m) for m in moved) if model.use_muon else moved
            total = tuple(w + d for w, d in zip(total, step, strict=True))  # type: ignore[assignment]
            fast = tuple(_same_row_norms(w, w0) for w, w0 in zip(total, initial, strict=True))  # type: ignore[assignment]
            total = total if model.ttt_prenorm else fast
    return torch.cat(outputs, 1)


def _apply(fast: Fast, z: Tensor) -> Tensor:
    """f(z) = W1 (SiLU(W0 z) * (W2 z)): [B, t, H, d] -> [B, t, H, d]."""
    w0, w1, w2 = fast
    hidden = F.silu(torch.einsum("bhoi,bthi->btho", w0, z)) * torch.einsum("bhoi,bthi->btho", w2, z)
    return torch.einsum("bhoi,bthi->btho", w1, hidden)


def _gradient(fast: Fast, k: Tensor, v: Tensor, rates: Tensor) -> Fast:
    """Of sum_t <f(k_t), v_t>, each token's part times its three rates; gradient ascent."""
    w0, w1, w2 = fast
    a, b = torch.einsum("bhoi,bthi->btho", w0, k), torch.einsum("bhoi,bthi->btho", w2, k)
    slope = a.sigmoid() * (1 + a * (1 - a.sigmoid()))  # of SiLU
    into = torch.einsum("bhoi,btho->bthi", w1, v)
    outer = "btho,bthi->bhoi"
    return (
        torch.einsum(outer, into * b * slope, k * rates[..., 0:1]),
        torch.einsum(outer, v, F.silu(a) * b * rates[..., 1:2]),
        torch.einsum(outer, into * F.silu(a), k * rates[..., 2:3]),
    )


def _same_row_norms(w: Tensor, initial: Tensor) -> Tensor:
    return w / (w.norm(dim=-1, keepdim=True) + NORM_EPS) * initial.norm(dim=-1, keepdim=True)


def _orthogonal(g: Tensor) -> Tensor:
    """Five Newton-Schulz steps towards the nearest semi-orthogonal matrix (Muon)."""
    x = g / (g.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for a, b, c in NEWTON_SCHULZ:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def _rope(x: Tensor, theta: float) -> Tensor:
    """Rotary positions 0, 1, ... of x [B, T, heads, d], halves paired; angles in fp64."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype)[:, None], angles.sin().to(x.dtype)[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)
