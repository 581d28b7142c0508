"""The (gated) delta rule in chunks of 64 tokens, in torch, on any device and in any precision.

Within a chunk, the rows u_t that the tokens write (S <- S + k_t u_t^T) solve a triangular system; its right-hand side
is linear in the chunk's start state S, so everything but two products with S is done for all chunks at once (WY form,
arXiv 2406.06484 section 3).

What makes branches cheap: u_t depends only on tokens up to t. So the state after r tokens of a chunk is

    S_r = e^{G_r} S + sum_{j<r} e^{G_r - G_j} k_j u_j^T        (G: cumulative log decay within the chunk; 0 without
    gate)

one masked matrix product of tensors that the pass has anyway, and in its autograd graph.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_refine.kernels.pick import pick
from megatron_refine.kernels.places import Places

CHUNK = 64


@dataclass(frozen=True)
class ChunkTrace:
    """What a chunked pass leaves behind: enough for the state after any number of tokens, in the graph of the pass.

    Lists over the chunks, so that a gradient into one chunk touches that chunk alone.
    """

    chunk: int
    states: list[Tensor]  # [N, H, K, V] before each chunk and after the last
    keys: list[Tensor]  # [N, H, C, K]
    writes: list[Tensor]  # [N, H, C, V], the rows u
    decays: list[Tensor] | None  # [N, H, C] cumulative log decay G

    def state_at(self, places: Places) -> Tensor:
        """The states at P places -> [P, H, K, V]."""
        starts = [(tokens // self.chunk, sequence) for sequence, tokens in places.on_host]
        last = len(self.keys) - 1  # a place at the very end reads no row of the (absent) next chunk
        where = [(min(chunk, last), row) for chunk, row in starts]
        state = pick(self.states, [(chunk, self._start_row(chunk, row)) for chunk, row in starts])
        decays = None if self.decays is None else pick(self.decays, where)
        inside = places.tokens % self.chunk
        return state_within(state, pick(self.keys, where), pick(self.writes, where), decays, inside)

    def _start_row(self, chunk: int, row: int) -> int:
        """Where a sequence's state stands. Before the first chunk, consecutive sequences may share theirs."""
        return row * self.states[chunk].shape[0] // self.keys[0].shape[0]


def state_within(state: Tensor, keys: Tensor, writes: Tensor, decays: Tensor | None, inside: Tensor) -> Tensor:
    """The states after `inside` [P] tokens of chunks: S_r of the formula above.

    Args: state [P, H, K, V] before the chunk; of its C tokens keys [P, H, C, K], the rows u [P, H, C, V] and the
    cumulative decays G [P, H, C], None without gate. Returns: [P, H, K, V].
    """
    mask = (torch.arange(keys.shape[2], device=inside.device) < inside[:, None])[:, None]  # [P, 1, C]
    if decays is None:
        return state + (keys * mask[..., None]).mT @ writes
    before = (inside - 1).clamp(min=0)[:, None, None].expand(*decays.shape[:2], 1)
    total = decays.gather(-1, before) * (inside > 0)[:, None, None]  # G_r, [P, H, 1]
    weight = torch.where(mask, total - decays, -torch.inf).exp()
    return state * total[..., None].exp() + (keys * weight[..., None]).mT @ writes


def chunk_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor, ChunkTrace]:
    """Same maths as `recurrent_delta_rule`; computed and returned in at least fp32.

    Args: q, k [N, T, G, K] where G divides H: each serves H/G consecutive heads; v [N, T, H, V]; beta, g [N, T, H];
    state [P, H, K, V] where P divides N: each start state serves N/P consecutive sequences (the branches of one
    position) and is never copied to read it.
    Returns: o [N, T, H, V], final state [N, H, K, V], trace.
    """
    size, length, shared = min(CHUNK, k.shape[1]), k.shape[1], v.shape[2] // k.shape[2]
    if shared > 1:
        q, k = q.repeat_interleave(shared, 2), k.repeat_interleave(shared, 2)
    dtype = torch.promote_types(q.dtype, torch.float32)
    if length == 1 and state is not None:
        qt, kt, vt, bt = (x.to(dtype)[:, 0] for x in (q, k, v, beta))
        return _one_token(qt, kt, vt, bt, None if g is None else g.to(dtype), state.to(dtype))
    q, k, v = (_chunks(x.to(dtype), size) for x in (q, k, v))  # [N, H, NT, C, *]
    beta = _chunks(beta.to(dtype)[..., None], size)
    decay = None if g is None else _chunks(g.to(dtype)[..., None], size)[..., 0].cumsum(-1)
    written, read_k, read_q, scores, kept_k = _within_chunks(q, k, v, beta, decay)
    if state is None:
        state = k.new_zeros(k.shape[0], k.shape[1], k.shape[-1], v.shape[-1])
    state = state.to(dtype)
    states, writes, outputs = [state], [], []
    ends = [None] * k.shape[2] if decay is None else decay[..., -1].exp()[..., None, None].unbind(2)
    # unbind, not indexing: the backward of indexing would fill a tensor of all chunks for every chunk
    for u, rk, rq, s, kk, end in zip(
        *(x.unbind(2) for x in (written, read_k, read_q, scores, kept_k)), ends, strict=True
    ):
        u = u - _read(rk, state)
        outputs.append(_read(rq, state) + s @ u)
        writes.append(u)
        old = state.repeat_interleave(u.shape[0] // state.shape[0], 0) if u.shape[0] != state.shape[0] else state
        state = torch.addcmul(kk.mT @ u, old, end) if end is not None else old + kk.mT @ u
        states.append(state)
    o = torch.stack(outputs, 2).flatten(2, 3).transpose(1, 2)[:, :length]
    trace = ChunkTrace(size, states, list(k.unbind(2)), writes, None if decay is None else list(decay.unbind(2)))
    return o, state, trace


def _one_token(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor, ChunkTrace]:
    """A step of decoding: the recurrence itself, a fifth of a chunk's operations. q, k, v [N, H, *]; g [N, 1, H]."""
    start = state
    if state.shape[0] != k.shape[0]:
        state = state.repeat_interleave(k.shape[0] // state.shape[0], 0)
    if g is not None:
        state = state * g[:, 0, :, None, None].exp()
    write = beta[..., None] * (v - (k[:, :, None] @ state)[:, :, 0])  # [N, H, V]
    final = torch.addcmul(state, k[..., None], write[:, :, None])
    o = (q[:, :, None] @ final)[:, :, 0] * q.shape[-1] ** -0.5
    decays = None if g is None else [g.transpose(1, 2)]
    return o[:, None], final, ChunkTrace(1, [start, final], [k[:, :, None]], [write[:, :, None]], decays)


def _chunks(x: Tensor, size: int) -> Tensor:
    """[N, T, H, D] -> [N, H, NT, C, D], padded with zero rows: they write nothing."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % size))
    return x.transpose(1, 2).unflatten(2, (-1, size))


def _within_chunks(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All that does not depend on the start state S.

    u = written - read_k S;  o = read_q S + scores u;  S' = e^G S + kept_k^T u.
    """
    q = q * k.shape[-1] ** -0.5
    k_beta = k * beta
    system, scores = k_beta @ k.mT, q @ k.mT
    read_k, read_q, kept_k = k_beta, q, k
    if decay is not None:
        upper = torch.ones(k.shape[-2], k.shape[-2], dtype=torch.bool, device=k.device).triu(1)
        between = (decay[..., :, None] - decay[..., None, :]).masked_fill(upper, -torch.inf).exp()
        system, scores = system * between, scores * between
        read_k, read_q = k_beta * decay[..., None].exp(), q * decay[..., None].exp()
        kept_k = k * (decay[..., -1:] - decay)[..., None].exp()
    right = torch.cat([v * beta, read_k], -1)
    solved = torch.linalg.solve_triangular(system.tril(-1), right, upper=False, unitriangular=True)
    written, read_k = solved.split([v.shape[-1], k.shape[-1]], -1)
    return written, read_k, read_q, scores.tril(), kept_k


def _read(x: Tensor, state: Tensor) -> Tensor:
    """x [N, H, C, K] times state [P, H, K, V]; the N/P sequences of a state are folded into rows of one product."""
    shared = x.shape[0] // state.shape[0]
    if shared == 1:
        return x @ state
    rows = x.unflatten(0, (-1, shared)).transpose(1, 2)  # [P, H, n, C, K]
    read = rows.flatten(2, 3) @ state
    return read.unflatten(2, rows.shape[2:4]).transpose(1, 2).flatten(0, 1)
