"""What the parts of flash-linear-attention's chunked rule compute, in torch and in any precision.

`kernels/delta_rule/fla.py` calls the real ones under these names. A backward part is the gradient of a forward one with
all that the other parts account for held fixed, so autograd says what it is. Decays are logarithms to base 2; their
gradients are those of natural ones.
"""

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

CHUNK = 64
Grad = torch.autograd.grad


def parts() -> SimpleNamespace:
    """As `fla._parts`."""
    return SimpleNamespace(
        cumsum=cumsum, solve=solve, states=states, outputs=outputs, solve_again=solve_again,
        writes_backward=writes_backward, states_backward=states_backward, outputs_backward=outputs_backward,
        solve_backward=solve_backward,
    )  # fmt: skip


def cumsum(g: Tensor, chunk_size: int, scale: float = 1.0, reverse: bool = False) -> Tensor:
    """[N, T, H], within each chunk."""
    each = g.split(chunk_size, 1)
    return scale * torch.cat([c.flip(1).cumsum(1).flip(1) if reverse else c.cumsum(1) for c in each], 1)


def chunks(heads: int, *tensors: Tensor | None) -> Iterator[list[Any]]:
    """Of tensors [N, T, heads or a divisor, ...], chunk by chunk: [N, heads, C, ...]. None stays None."""

    def one(x: Tensor) -> list[Tensor]:
        return [c.repeat_interleave(heads // x.shape[2], 2).transpose(1, 2) for c in x.split(CHUNK, 1)]

    length = next(x.shape[1] for x in tensors if x is not None)
    columns = [[None] * -(-length // CHUNK) if x is None else one(x) for x in tensors]
    yield from (list(row) for row in zip(*columns, strict=True))


def joined(found: list[Tensor]) -> Tensor:
    """[N, H, C, ...] of each chunk -> [N, T, H, ...]."""
    return torch.cat([x.transpose(1, 2) for x in found], 1)


def solve(k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(I + A)^-1 [N, T, H, C] of A = tril(beta k k^T e^(G_i - G_j), -1), and W, U of it."""
    solved = []
    for k_c, g_c, b_c in chunks(v.shape[2], k, g, beta):
        system = b_c[..., None] * k_c @ k_c.mT
        if g_c is not None:
            system = system * (g_c[..., :, None] - g_c[..., None, :]).tril().exp2()
        unit = torch.eye(system.shape[-1], dtype=system.dtype)
        inverse = torch.linalg.inv(system.tril(-1) + unit)
        solved.append(torch.nn.functional.pad(inverse, (0, CHUNK - inverse.shape[-1])))
    inverses = joined(solved)
    return *solve_again(k, v, beta, inverses, g), inverses


def solve_again(k: Tensor, v: Tensor, beta: Tensor, A: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor]:
    """W = (I + A)^-1 beta k e^G, U = (I + A)^-1 beta v."""
    w, u = [], []
    for k_c, v_c, b_c, a_c, g_c in chunks(v.shape[2], k, v, beta, A, g):
        a_c, decay = a_c[..., : a_c.shape[2]], 1 if g_c is None else g_c.exp2()[..., None]
        w.append(a_c @ (b_c[..., None] * k_c * decay))
        u.append(a_c @ (b_c[..., None] * v_c))
    return joined(w), joined(u)


def after(state: Tensor, k: Tensor, writes: Tensor, g: Tensor | None) -> Tensor:
    """The state after a chunk's tokens: e^G S + k^T (u e^(G - G_j))."""
    if g is None:
        return state + k.mT @ writes
    return state * g[..., -1:, None].exp2() + k.mT @ (writes * (g[..., -1:] - g).exp2()[..., None])


def states(
    k: Tensor, w: Tensor, u: Tensor, g: Tensor | None, initial_state: Tensor, output_final_state: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """States before each chunk [N, NT, H, K, V], the rows u, the final state."""
    state, found, writes = initial_state, [], []
    for k_c, w_c, u_c, g_c in chunks(u.shape[2], k, w, u, g):
        found.append(state)
        writes.append(u_c - w_c @ state)
        state = after(state, k_c, writes[-1], g_c)
    return torch.stack(found, 1), joined(writes), state if output_final_state else None


def outputs(q: Tensor, k: Tensor, v: Tensor, h: Tensor, g: Tensor | None, scale: float) -> Tensor:
    """o = scale (q e^G S + tril(q k^T e^(G_i - G_j)) u)."""
    found = []
    for state, (q_c, k_c, v_c, g_c) in zip(h.unbind(1), chunks(v.shape[2], q, k, v, g), strict=True):
        scores, read = (q_c @ k_c.mT).tril(), q_c
        if g_c is not None:
            scores = scores * (g_c[..., :, None] - g_c[..., None, :]).tril().exp2()
            read = q_c * g_c.exp2()[..., None]
        found.append(scale * (read @ state + scores @ v_c))
    return joined(found)


def leaves(*tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x.detach().requires_grad_() for x in tensors]


def gradients(value: Tensor, of: list[Any]) -> list[Any]:
    """Of leaves, the last of which are decays; None of None."""
    found = Grad(value, [x for x in of if x is not None])
    return list(found) if of[-1] is not None else [*found, None]


@torch.enable_grad()
def writes_backward(q: Tensor, k: Tensor, do: Tensor, g: Tensor | None, scale: float) -> Tensor:
    """Of the rows u, what the outputs of their own chunk contribute."""
    (v,) = leaves(torch.zeros_like(do))
    nothing = do.new_zeros(do.shape[0], -(-do.shape[1] // CHUNK), do.shape[2], q.shape[3], do.shape[3])
    return Grad((outputs(q, k, v, nothing, g, scale) * do).sum(), v)[0]


def states_backward(
    q: Tensor, k: Tensor, w: Tensor, do: Tensor, dv: Tensor, g: Tensor | None, h0: Tensor, dht: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the states after each chunk, of the start state, and of the rows u, of which `dv` is what is known."""
    later, found, writes = dht, [], []
    for q_c, k_c, w_c, do_c, dv_c, g_c in reversed(list(chunks(do.shape[2], q, k, w, do, dv, g))):
        found.append(later)
        kept, read = k_c, q_c
        if g_c is not None:
            kept = k_c * (g_c[..., -1:] - g_c).exp2()[..., None]
            read = q_c * g_c.exp2()[..., None]
        writes.append(dv_c + kept @ later)
        decay = 1 if g_c is None else g_c[..., -1:, None].exp2()
        later = later * decay + scale * read.mT @ do_c - w_c.mT @ writes[-1]
    return torch.stack(found[::-1], 1), later, joined(writes[::-1])


@torch.enable_grad()
def outputs_backward(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, g: Tensor | None, h: Tensor, dv: Tensor, do: Tensor, dh: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Of q, k, w and decays, from the outputs, the states after each chunk, and the rows u = U - W S."""
    q, k, w, g = leaves(q, k, w, g)
    value = (outputs(q, k, v, h, g, scale) * do).sum()
    for i, (k_c, v_c, w_c, dv_c, g_c) in enumerate(chunks(v.shape[2], k, v, w, dv, g)):
        value = value + (after(h[:, i], k_c, v_c, g_c) * dh[:, i]).sum() - (w_c @ h[:, i] * dv_c).sum()
    dq, dk, dw, dg = gradients(value, [q, k, w, g])
    return dq, dk, dw, None if dg is None else dg / math.log(2)


@torch.enable_grad()
def solve_backward(
    k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, A: Tensor, dw: Tensor, du: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Of k, v, beta and decays, from W and U."""
    k, v, beta, g = leaves(k, v, beta, g)
    w, u, _ = solve(k, v, g, beta)
    dk, dv, dbeta, dg = gradients((w * dw).sum() + (u * du).sum(), [k, v, beta, g])
    return dk, dv, dbeta, None if dg is None else dg / math.log(2)
