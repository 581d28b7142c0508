"""LaCT's sequence mixer on Megatron-Core: fast-weight heads, with their attention heads, over tensor-parallel ranks.

Per fast-weight head of width D (facts of the authors' lact_llm layer, arXiv 2505.23884):
    q, k, v = x Wq, x Wk, x Wv;   window = softmax attention of RoPE(q), RoPE(k), v in heads of their own
    fq, fk = RoPE(unit(SiLU(scale q + offset))), the same of k;   fv = SiLU(v)
    rates = softplus(x Wr + br + softplus^-1(0.001)), one for each matrix;   m = sigmoid(x Wm + bm)
    y = Wo (window + RMSNorm(f_W(fq)) SiLU(x Ws + bs)),   where f_W is trained on (fk, fv): kernels/lact
in_proj.weight holds, head by head, the rows [q | k | v | rates (3) | momentum (1) | scale (1)]; in_bias [heads, rows]
likewise, without q, k, v unless model.qkv_bias, flattened. Head j holds columns j D .. (j + 1) D of q, k and v: whole
attention heads. qk_scale, qk_offset [hidden, 2] (q, k); w1 [heads, D, I]; w0, w2 [heads, I, D], or their factors
w0_left [heads, I, rank], w0_right [heads, rank, D].
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from megatron_refine.kernels.lact import Rule, Tokens, Weights, chunk_lact, join, read, stacked
from megatron_refine.kernels.places import Places
from megatron_refine.kernels.tap import Tap
from megatron_refine.kernels.window_attention import branch_attention, window_attention
from megatron_refine.models.common.norm import HeadNorm
from megatron_refine.models.common.rope import Table, first_positions, table
from megatron_refine.models.lact.config import LactConfig
from megatron_refine.models.lact.inputs import IDENTITY, READ_EPS, Inputs, Shape, joined
from megatron_refine.models.lact.state import LactState
from megatron_refine.models.mixer import Mixer, sharded


@dataclass(frozen=True)
class LactHandle:
    """A finished main pass."""

    weights: list[Weights]  # at the start of each chunk
    chunks: list[Tokens]
    keys: Tap  # [B, T, h, d], turned by position
    values: Tap
    chunk: int
    window: int

    def at(self, places: Places) -> LactState:
        index = places.sequences[:, None], places.before(min(self.window - 1, max(p for _, p in places.on_host)))[0]
        # at the very end of a full last chunk the update is still to come
        lie = [(min(p // self.chunk, len(self.weights) - 1), row, p) for row, p in places.on_host]
        return LactState(
            self.weights, [(chunk, row) for chunk, row, _ in lie], self.chunks,
            [(chunk, row, p - chunk * self.chunk) for chunk, row, p in lie], [0] * len(lie), None,
            (_by_head(self.keys.read(*index)), _by_head(self.values.read(*index))), places.tokens, 0, None, self.chunk,
        )  # fmt: skip


def _by_head(rows: Tensor) -> Tensor:
    """[P, L, h, d], laid out as products over each head read it: once, in place of a copy for each token."""
    return rows.transpose(1, 2).contiguous().transpose(1, 2)


class LactMixer(Mixer):
    """LaCT as a Megatron self-attention module; built by a ModuleSpec with `model` in its params."""

    def __init__(self, config: Any, layer_number: int, model: LactConfig, pg_collection: Any, **_: Any):
        super().__init__(config)
        self.layer_number, self.model = layer_number, model
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        self.heads, self.dim = model.num_lact_heads // self.tp_group.size(), model.head_dim
        self.rule = Rule(model.lact_chunk_size, model.use_muon, model.ttt_prenorm)
        self.shape = Shape.of(model)
        self.widths = self.shape.widths
        linear = {"config": config, "bias": False, "tp_group": self.tp_group, "skip_bias_add": True}
        self.in_proj = ColumnParallelLinear(
            model.hidden_size, model.num_lact_heads * sum(self.widths), init_method=config.init_method,
            gather_output=False, **linear,
        )  # fmt: skip
        self.own: list[str] = []
        self._add("in_bias", [self.heads * sum(self.widths[0 if model.qkv_bias else 1 :])], _constant(0.0))
        for name, value in (("qk_scale", 1.0), ("qk_offset", 0.0)):
            self._add(name, [self.heads * self.dim, 2], _constant(value))
        self._add_fast_weights(model)
        self.ttt_norm = HeadNorm(config, self.dim, READ_EPS)
        self.out_proj = RowParallelLinear(
            model.hidden_size, model.hidden_size, init_method=config.output_layer_init_method,
            input_is_parallel=True, **linear,
        )  # fmt: skip

    def _add_fast_weights(self, model: LactConfig) -> None:
        inner, rank, gain = model.inner_dim, model.w0_w2_low_rank, model.fw_init_gain
        self._add("w1", [self.heads, self.dim, inner], _normal(inner**-0.5))
        for name in ("w0", "w2"):
            if rank <= 0:
                self._add(name, [self.heads, inner, self.dim], _normal(self.dim**-0.5))
                continue
            self._add(f"{name}_left", [self.heads, inner, rank], _normal(gain * rank**-0.5))
            self._add(f"{name}_right", [self.heads, rank, self.dim], _normal(gain * self.dim**-0.5))

    def _add(self, name: str, shape: list[int], initialize: Callable[[Tensor, torch.Generator], Tensor]) -> None:
        self.register_parameter(name, sharded(torch.empty(shape, dtype=self.config.params_dtype), initialize))
        self.own.append(name)

    def own_parameters(self) -> dict[str, nn.Parameter]:
        return {name: getattr(self, name) for name in self.own}

    def project(self, hidden: Tensor) -> Tensor:
        return self.in_proj(hidden)[0].unflatten(-1, (self.heads, sum(self.widths)))

    def main(self, rows: Tensor) -> tuple[Tensor, LactHandle]:
        turn = first_positions(rows.shape[1], self._half, self.model.rope_theta, rows.dtype, rows.device)
        x = self._inputs(rows, turn)
        keys, values = Tap.on(x.k), Tap.on(x.v)
        attended = window_attention(x.q, keys.stream, values.stream, self.model.window_size)
        found, weights, chunks = chunk_lact(self.initial(), x.fast_q, x.tokens, self.rule)
        handle = LactHandle(weights, chunks, keys, values, self.rule.chunk, self.model.window_size)
        return joined(attended, found, self.ttt_norm.weight, x.scale), handle

    def branch(self, rows: Tensor, state: LactState) -> tuple[Tensor, LactState]:
        count, length = rows.shape[:2]
        if state.own is not None:
            state = state.fork(count // state.own.x.shape[0])
        places = (state.before + state.fed).repeat_interleave(count // len(state.before))  # [P * n]
        positions = places[:, None] + torch.arange(length, device=rows.device)
        x = self._inputs(rows, table(positions, self._half, self.model.rope_theta, rows.dtype))
        window = x.k, x.v
        if state.window is not None:
            window = torch.cat([state.window[0], x.k], 1), torch.cat([state.window[1], x.v], 1)
        attended = branch_attention(x.q, state.prefix, window, state.before, self.model.window_size)
        found, state = self._branch_memory(x, state, places)
        return joined(attended, found, self.ttt_norm.weight, x.scale), _trimmed(state, window, self.model.window_size)

    def _branch_memory(self, x: Inputs, state: LactState, places: Tensor) -> tuple[Tensor, LactState]:
        """Read and, at each chunk's end, update: entries reach theirs at different rows. places [P * n], of row 0."""
        length = x.fast_q.shape[1]
        own, earlier = x.tokens, 0
        if state.own is not None:
            own, earlier = join([state.own, x.tokens]), len(state.own)
        found, done, ends = None, [0] * len(state.where), 0
        row = torch.arange(length, device=x.fast_q.device)
        while True:
            before = len(state.where)
            state = state.updated(own, [earlier + d for d in done], self.initial, self.rule)
            done = [d for d in done for _ in range(len(state.where) // before)]
            state = replace(state, gathered=state.used())
            now = read(state.used(), x.fast_q)
            if found is None:
                found = now
            else:  # `done`, as the device knows it
                first = ends * self.rule.chunk - places % self.rule.chunk
                found = torch.where((row >= first[:, None])[..., None, None], now, found)
            taken = [min(self.rule.chunk - state.open(i), length - d) for i, d in enumerate(done)]
            done = [d + t for d, t in zip(done, taken, strict=True)]
            fresh = [f + t for f, t in zip(state.fresh, taken, strict=True)]
            state, ends = replace(state, fresh=fresh, own=own), ends + 1
            if min(done) == length:
                return found, replace(state, fed=state.fed + length)

    def initial(self) -> Tensor:
        """The fast weights before the first chunk, [H, 3, I, D], at least fp32."""
        high = torch.promote_types(self.w1.dtype, torch.float32)

        def whole(name: str) -> Tensor:
            return self.mine(getattr(self, name)).to(high)

        if self.model.w0_w2_low_rank <= 0:
            return stacked(whole("w0"), whole("w1"), whole("w2"))
        identity = IDENTITY * torch.eye(self.model.inner_dim, self.dim, device=self.w1.device, dtype=high)
        w0, w2 = (whole(f"{name}_left") @ whole(f"{name}_right") + identity for name in ("w0", "w2"))
        return stacked(w0, whole("w1"), w2)

    @property
    def _half(self) -> int:
        """Of an attention head's width."""
        return self.shape.attention_dim // 2

    def _inputs(self, rows: Tensor, turn: Table) -> Inputs:
        """rows [N, m, H, *] at the positions of a table."""
        scale, offset = (self.mine(x.view(self.heads, self.dim, 2)) for x in (self.qk_scale, self.qk_offset))
        bias = self.mine(self.in_bias.view(self.heads, -1))
        return Inputs.of(rows, bias, (scale, offset), turn, self.shape)

    def output(self, mixed: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.out_proj(mixed.to(rows.dtype))


def _trimmed(state: LactState, window: tuple[Tensor, Tensor], size: int) -> LactState:
    """Without what no later token needs: constant memory however long a branch grows."""
    assert state.own is not None
    kept, (keys, values) = max(state.fresh), window
    own = state.own.part(slice(None), slice(len(state.own) - kept, None))
    if keys.shape[1] >= size - 1:  # all that is visible is a branch's own
        keys, values = keys[:, 1 - size :], values[:, 1 - size :]
        state = replace(state, prefix=(state.prefix[0][:, :0], state.prefix[1][:, :0]))
    return replace(state, own=own, window=(keys, values))


def _constant(value: float) -> Callable[[Tensor, torch.Generator], Tensor]:
    return lambda full, generator: full.fill_(value)


def _normal(std: float) -> Callable[[Tensor, torch.Generator], Tensor]:
    return lambda full, generator: full.normal_(0.0, std, generator=generator)
