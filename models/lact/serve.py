"""LaCT for SGLang: fast weights, what the open chunk has gathered, and the window, all in a request's slot.

Within a chunk the weights do not change, so G, the sum that they will be updated with, is gathered token by token: a
prompt may be computed in any parts, and no token of the chunk has to be kept. The update at a chunk's end is made by
the first token after it, as in training: a state at the end of a chunk still owes it.

A slot's `temporal` holds, head by head in fp32, W as it is read, T where that is another (prenorm), M where there is
momentum, G, and the sum of the open chunk's momenta. Its `conv` is a ring of the last window_size keys and values.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sglang.srt.distributed import divide
from sglang.srt.layers.linear import RowParallelLinear
from sglang.srt.model_executor.forward_context import get_attn_backend
from sglang.srt.runtime_context import get_parallel
from torch import Tensor, nn

from megatron_refine.kernels.lact import Rule, ascent, ended, read, row_lengths, stacked
from megatron_refine.kernels.window_attention import branch_attention, window_attention
from megatron_refine.models.common.rope import Table, table
from megatron_refine.models.lact.config import LactConfig
from megatron_refine.models.lact.inputs import IDENTITY, Inputs, Shape, joined
from megatron_refine.models.mixers.delta.serve import Decoder, ForCausalLM, Norm, Ragged, sharded_parameter


@dataclass
class Fast:
    """Fast weights of N requests, [N, H, 3, I, D] in fp32: W0, W2 and the transpose of W1."""

    used: Tensor  # W
    total: Tensor  # T
    moved: Tensor  # M
    step: Tensor  # G of the open chunk so far
    momentum: Tensor  # [N, H], the sum over its tokens

    @classmethod
    def new(cls, initial: Tensor, count: int) -> "Fast":
        """Make those of requests before their first token."""
        used = initial.float().expand(count, *initial.shape)
        zeros = torch.zeros_like(used)
        return cls(used, used, zeros, zeros, zeros[..., 0, 0, 0])

    @classmethod
    def unpack(cls, model: LactConfig, kept: Tensor) -> "Fast":
        """Read rows [N, H, *] of the pool."""
        inner, dim = model.inner_dim, model.head_dim
        whole = kept[..., :-1].unflatten(-1, (model.planes, 3, inner, dim))
        used, step, *more = whole.unbind(2)
        total = more.pop(0) if model.ttt_prenorm else used
        return cls(used, total, more.pop(0) if model.use_momentum else torch.zeros_like(used), step, kept[..., -1])

    def pack(self, model: LactConfig) -> Tensor:
        """The inverse."""
        more = [self.total] * model.ttt_prenorm + [self.moved] * model.use_momentum
        whole = torch.stack([self.used, self.step, *more], 2).flatten(2)
        return torch.cat([whole, self.momentum[..., None]], -1)

    def after(self, x: Inputs, first: int, last: int) -> "Fast":
        """Add rows first .. last of x, which lie in the open chunk."""
        tokens = x.tokens.part(slice(None), slice(first, last))
        step, _ = ascent(self.used.to(tokens.x.dtype), tokens.x, tokens.rates)
        momentum = self.momentum if tokens.momentum is None else self.momentum + tokens.momentum.float().sum(-1)
        return Fast(self.used, self.total, self.moved, self.step + step.float(), momentum)

    def updated(self, model: LactConfig, initial: Tensor) -> "Fast":
        """Make the update at the end of a chunk."""
        rule = Rule(model.lact_chunk_size, model.use_muon, model.ttt_prenorm)
        mean = self.momentum / model.lact_chunk_size if model.use_momentum else None
        used, total, moved = ended(rule, self.step, self.total, self.moved, row_lengths(initial.float()), mean)
        zeros = torch.zeros_like(used)
        return Fast(used, total, moved, zeros, zeros[..., 0, 0, 0])


class Affine(nn.Module):
    """A linear layer with a bias, its rows cut over tp."""

    def __init__(self, hidden: int, out: int):
        super().__init__()
        self.weight, self.bias = sharded_parameter(out, hidden), sharded_parameter(out)


class LowRank(nn.Module):
    """The factors of an initial W0 or W2."""

    def __init__(self, heads: int, inner: int, rank: int, dim: int):
        super().__init__()
        self.w_left, self.w_right = sharded_parameter(heads, inner, rank), sharded_parameter(heads, rank, dim)


class Projection(nn.Module):
    """q, k and v in one tensor, one below the other; with a bias where the model has one."""

    def __init__(self, hidden: int, bias: bool):
        super().__init__()
        blocks = (hidden, hidden, hidden)
        self.weight = sharded_parameter(3 * hidden, hidden, blocks=blocks)
        self.bias = sharded_parameter(3 * hidden, blocks=blocks) if bias else None


class LactAttention(nn.Module):
    """The mixer of a layer on its slots."""

    def __init__(self, model: LactConfig, layer: int):
        super().__init__()
        self.model, self.layer, self.shape = model, layer, Shape.of(model)
        hidden, heads, rank = model.hidden_size, model.num_lact_heads, model.w0_w2_low_rank
        self.heads = divide(heads, get_parallel().tp_size)
        self.qkv, self.lr_proj = Projection(hidden, model.qkv_bias), Affine(hidden, 3 * heads)
        self.momentum_proj = nn.ModuleList([Affine(hidden, heads)] if model.use_momentum else [])
        self.ttt_scale_proj = Affine(hidden, heads) if model.learnable_ttt_scale else None
        self.qk_scale, self.qk_offset = sharded_parameter(hidden, 2), sharded_parameter(hidden, 2)
        self.w1 = sharded_parameter(heads, model.head_dim, model.inner_dim)
        self.w0, self.w2 = (self._outer(heads, rank) for _ in range(2))
        self.ttt_norm = Norm(model.head_dim, model.norm_eps)
        self.o_proj = RowParallelLinear(hidden, hidden, bias=False)

    def _outer(self, heads: int, rank: int) -> Any:
        """An initial W0 or W2: whole, or its factors."""
        inner, dim = self.model.inner_dim, self.model.head_dim
        return LowRank(heads, inner, rank, dim) if rank > 0 else sharded_parameter(heads, inner, dim)

    def initial(self) -> Tensor:
        """The fast weights before the first chunk, [H, 3, I, D], in fp32."""
        if self.model.w0_w2_low_rank <= 0:
            return stacked(self.w0.float(), self.w1.float(), self.w2.float())
        identity = IDENTITY * torch.eye(self.model.inner_dim, self.model.head_dim, device=self.w1.device)
        w0, w2 = (w.w_left.float() @ w.w_right.float() + identity for w in (self.w0, self.w2))
        return stacked(w0, self.w1.float(), w2)

    def inputs(self, x: Tensor, turn: Table) -> Inputs:
        """Rows x [N, m, hidden] at the positions of a table."""
        others = [self.lr_proj, *self.momentum_proj, *([self.ttt_scale_proj] if self.ttt_scale_proj else [])]
        qkv = F.linear(x, self.qkv.weight).unflatten(-1, (3, self.heads, -1)).transpose(-3, -2).flatten(-2)
        rows = [F.linear(x, each.weight).unflatten(-1, (self.heads, -1)) for each in others]
        biases = [each.bias.unflatten(0, (self.heads, -1)) for each in others]
        if self.qkv.bias is not None:
            biases.insert(0, self.qkv.bias.unflatten(0, (3, self.heads, -1)).transpose(0, 1).flatten(1))
        moves = (self.qk_scale.view(self.heads, -1, 2), self.qk_offset.view(self.heads, -1, 2))
        return Inputs.of(torch.cat([qkv, *rows], -1), torch.cat(biases, -1), moves, turn, self.shape)

    def update(self, pool: Any, slots: Tensor) -> None:
        """Make the updates that the states in these slots owe."""
        fast = Fast.unpack(self.model, pool.temporal[slots])
        pool.temporal[slots] = fast.updated(self.model, self.initial()).pack(self.model)

    def forward(self, x: Tensor, batch: Any, ragged: Ragged) -> Tensor:
        """[R, hidden] -> [R, hidden]; reads and writes the slots of the batch's requests."""
        found = get_attn_backend().conv_state_metadata(self.layer, batch)
        slots, pool = found.cache_indices.clamp(min=0), found.layer_cache  # padding has -1
        if ragged.lengths is None:
            mixed = self._decoded(x, batch.positions, pool, slots)
        else:
            mixed = self._parts(x, batch.positions, [int(n) for n in batch.extend_prefix_lens_cpu], pool, slots, ragged)
        return self.o_proj(mixed.to(x.dtype))[0]

    def _parts(
        self, x: Tensor, positions: Tensor, begun: list[int], pool: Any, slots: Tensor, ragged: Ragged
    ) -> Tensor:
        """A part of each request's prompt: rows [R, hidden]. Single rows, as of rollouts' last ones, go together."""
        lengths = ragged.lengths or []
        single = [i for i, length in enumerate(lengths) if length == 1 and begun[i]]
        starts, mixed = [0, *itertools.accumulate(lengths)], list[Tensor]([x] * len(lengths))
        if due := [i for i in single if begun[i] % self.model.lact_chunk_size == 0]:
            self.update(pool, slots[due])
        if single:
            rows = [starts[i] for i in single]
            found = self._decoded(x[rows], positions[rows], pool, slots[single])
            for i, row in zip(single, found.split(1), strict=True):
                mixed[i] = row
        for i in set(range(len(lengths))) - set(single):
            mixed[i] = self._extended(x[starts[i] : starts[i + 1]], begun[i], pool, slots[i : i + 1])
        return torch.cat(mixed)

    def _turn(self, positions: Tensor, dtype: torch.dtype) -> Table:
        return table(positions, self.shape.attention_dim // 2, self.model.rope_theta, dtype)

    def _decoded(self, x: Tensor, positions: Tensor, pool: Any, slots: Tensor) -> Tensor:
        """A token of each request, at positions [N]: rows [N, hidden]."""
        inputs, window = self.inputs(x[:, None], self._turn(positions[:, None], x.dtype)), self.model.window_size
        fast, ring = Fast.unpack(self.model, pool.temporal[slots]), pool.conv[0]
        back = torch.arange(1 - window, 0, device=x.device)
        kept = ring[slots[:, None], (positions[:, None] + back) % window].to(x.dtype)
        prefix = self._heads(kept[..., : kept.shape[-1] // 2]), self._heads(kept[..., kept.shape[-1] // 2 :])
        attended = branch_attention(inputs.q, prefix, (inputs.k, inputs.v), positions, window)
        out = joined(attended, read(fast.used, inputs.fast_q), self.ttt_norm.weight, inputs.scale)
        ring[slots, positions % window] = self._flat(inputs)[:, 0].to(ring.dtype)
        pool.temporal[slots] = fast.after(inputs, 0, 1).pack(self.model)
        return out[:, 0]

    def _extended(self, x: Tensor, before: int, pool: Any, slots: Tensor) -> Tensor:
        """Rows [L, hidden] of one request after `before` others, in parts up to each chunk's end."""
        chunk, window, length, ring = self.model.lact_chunk_size, self.model.window_size, len(x), pool.conv[0]
        positions = torch.arange(before, before + length, device=x.device)
        inputs, initial = self.inputs(x[None], self._turn(positions[None], x.dtype)), self.initial()
        fast = Fast.unpack(self.model, pool.temporal[slots]) if before else Fast.new(initial, 1)
        found, done = list[Tensor](), 0
        while done < length:
            if before + done and (before + done) % chunk == 0:
                fast = fast.updated(self.model, initial)
            end = min(length, done + chunk - (before + done) % chunk)
            found.append(read(fast.used, inputs.fast_q[:, done:end]))
            fast, done = fast.after(inputs, done, end), end
        earlier = torch.arange(max(0, before - window + 1), before, device=x.device)
        kept = ring[slots[:, None], earlier % window].to(x.dtype)
        own, half = self._flat(inputs), kept.shape[-1] // 2
        k, v = (self._heads(torch.cat(both, 1)) for both in ((kept[..., :half], own[..., :half]),
                                                             (kept[..., half:], own[..., half:])))  # fmt: skip
        q = F.pad(inputs.q, (0, 0, 0, 0, len(earlier), 0))
        attended = window_attention(q, k, v, window)[:, len(earlier) :]
        last = slice(max(0, length - window), None)
        ring[slots[:, None], positions[last] % window] = own[:, last].to(ring.dtype)
        pool.temporal[slots] = fast.pack(self.model)
        return joined(attended, torch.cat(found, 1), self.ttt_norm.weight, inputs.scale)[0]

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (-1, self.shape.attention_dim))

    def _flat(self, inputs: Inputs) -> Tensor:
        """Keys, then values, [N, m, *]."""
        return torch.cat([inputs.k.flatten(-2), inputs.v.flatten(-2)], -1)


class LaCTForCausalLM(ForCausalLM):
    """Updates that decoded requests owe are made before a pass: a recorded one has no branches."""

    def decoder(self, model: Any) -> Decoder:
        return Decoder(model, LactAttention)

    def prepare_for_forward(self, forward_batch: Any) -> None:
        """Make them, for the requests of a decoded batch whose token is the first after a chunk. SGLang calls it."""
        backend, chunk = self.model.backend, self.config.typed_model.lact_chunk_size
        if backend is None or not forward_batch.forward_mode.is_decode():
            return
        before = [int(length) - 1 for length in forward_batch.seq_lens_cpu]
        due = [i for i, count in enumerate(before) if count and count % chunk == 0]
        if not due:
            return
        pools = backend.linear_attn_backend.req_to_token_pool
        slots = pools.get_mamba_indices(forward_batch.req_pool_indices[torch.tensor(due)]).long()
        with torch.no_grad():
            for i, layer in enumerate(self.model.layers):
                layer.attn.update(pools.mamba2_layer_cache(i), slots)


MODEL = LaCTForCausalLM
