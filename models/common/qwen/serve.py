"""Qwen's hybrids for SGLang: linear layers on slots, as models/mixers/delta/serve.py has them, and softmax attention
layers on SGLang's pages of keys and values."""

from typing import Any

import torch.nn.functional as F
from sglang.srt.distributed import divide
from sglang.srt.layers.linear import RowParallelLinear
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.runtime_context import get_parallel
from torch import Tensor, nn

from megatron_refine.models.common.qwen.config import QwenConfig
from megatron_refine.models.common.rope import rope, table
from megatron_refine.models.mixers.attention.inputs import gated, normed
from megatron_refine.models.mixers.delta.serve import (
    ForCausalLM,
    GatedMLP,
    Norm,
    Ragged,
    Sharded,
    StateMixer,
    column,
    embedding,
    sharded_parameter,
)
from megatron_refine.models.mixers.gated_delta.rule import gate_output, gates


class ZeroCentred(Norm):
    """The norm as trained: times 1 + weight, in at least fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return normed(x, self.weight, self.eps, zero_centred=True)


class LinearAttention(StateMixer):
    """A Gated DeltaNet layer. q, k and v are one tensor, one below the other."""

    def __init__(self, model: QwenConfig, layer: int):
        shape = model.state_shape
        super().__init__(shape, layer)
        hidden, heads, values = model.hidden_size, shape.heads, shape.blocks[-1]
        self.in_proj_qkv = Sharded(shape.channels, hidden, blocks=shape.blocks)
        self.conv1d = Sharded(shape.channels, 1, shape.conv_size, blocks=shape.blocks)
        self.in_proj_z, self.in_proj_b, self.in_proj_a = (column(hidden, width) for width in (values, heads, heads))
        self.A_log, self.dt_bias = sharded_parameter(heads), sharded_parameter(heads)
        self.norm = Norm(shape.value_dim, model.norm_eps)
        self.out_proj = RowParallelLinear(values, hidden, bias=False)

    def columns(self, x: Tensor) -> Tensor:
        return F.linear(x, self.in_proj_qkv.weight)

    def taps(self) -> Tensor:
        return self.conv1d.weight[:, 0]

    def rule_inputs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, ragged: Ragged) -> dict[str, Tensor]:
        a, b = (ragged.batch(project(x)[0]) for project in (self.in_proj_a, self.in_proj_b))
        beta, g = gates(a, b, self.A_log, self.dt_bias, 1.0)
        return {"q": q, "k": k, "v": v, "beta": beta, "g": g}

    def output(self, x: Tensor, o: Tensor) -> Tensor:
        o = gate_output(o, self.norm.weight, self.norm.eps, self.in_proj_z(x)[0])
        return self.out_proj(o.to(x.dtype).flatten(-2))[0]


class FullAttention(nn.Module):
    """A softmax attention layer: gated, q and k normed, a part of each head turned."""

    def __init__(self, model: QwenConfig, layer: int):
        super().__init__()
        self.shape = shape = model.full
        tp, hidden = get_parallel().tp_size, shape.hidden
        self.heads, self.keys = divide(shape.heads, tp), divide(shape.kv_heads, tp)
        self.q_proj = column(hidden, shape.heads * shape.query_width)
        self.k_proj, self.v_proj = (column(hidden, shape.kv_heads * shape.head_dim) for _ in range(2))
        self.o_proj = RowParallelLinear(shape.heads * shape.head_dim, hidden, bias=False)
        self.q_norm, self.k_norm = (ZeroCentred(shape.head_dim, shape.eps) for _ in range(2))
        self.attn = RadixAttention(
            self.heads, shape.head_dim, shape.head_dim**-0.5, num_kv_heads=self.keys, layer_id=layer
        )

    def forward(self, x: Tensor, batch: Any, turn: tuple[Tensor, Tensor]) -> Tensor:
        """[R, hidden] -> [R, hidden]; turn: of the rows' positions."""
        q, gate = self.q_proj(x)[0].unflatten(-1, (self.heads, -1)).chunk(2, -1)
        k, v = (project(x)[0].unflatten(-1, (self.keys, -1)) for project in (self.k_proj, self.v_proj))
        q, k = (rope(norm(z)[None], *turn)[0] for norm, z in ((self.q_norm, q), (self.k_norm, k)))
        mixed = self.attn(q.flatten(-2), k.flatten(-2), v.flatten(-2), batch)
        return self.o_proj(gated(mixed.unflatten(-1, (self.heads, -1)), gate).flatten(-2))[0]


class Layer(nn.Module):
    """Norm and mixer, norm and MLP, each with a residual."""

    def __init__(self, model: QwenConfig, layer: int):
        super().__init__()
        self.linear = model.kinds[layer] == "linear_attention"
        self.input_layernorm, self.post_attention_layernorm = (
            ZeroCentred(model.hidden_size, model.norm_eps) for _ in range(2)
        )
        if self.linear:
            self.linear_attn = LinearAttention(model, layer)
        else:
            self.self_attn = FullAttention(model, layer)
        self.mlp = GatedMLP(model)

    def forward(self, x: Tensor, batch: Any, ragged: Ragged, turn: tuple[Tensor, Tensor]) -> Tensor:
        rows = self.input_layernorm(x)
        x = x + (self.linear_attn(rows, batch, ragged) if self.linear else self.self_attn(rows, batch, turn))
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Token ids [R] at positions [R] -> final-norm rows [R, hidden]."""

    def __init__(self, model: QwenConfig):
        super().__init__()
        self.full = model.full
        self.embed_tokens = embedding(model)
        self.layers = nn.ModuleList(Layer(model, i) for i in range(model.num_layers))
        self.norm = ZeroCentred(model.hidden_size, model.norm_eps)

    @property
    def table(self) -> VocabParallelEmbedding:
        return self.embed_tokens

    def forward(self, tokens: Tensor, positions: Tensor, batch: Any) -> Tensor:
        ragged, x = Ragged(batch), self.embed_tokens(tokens)
        turn = table(positions[None], self.full.rotary_dims // 2, self.full.rope_theta, x.dtype)
        for layer in self.layers:
            x = layer(x, batch, ragged, turn)
        return self.norm(x)


class QwenForCausalLM(ForCausalLM):
    def decoder(self, model: Any) -> Decoder:
        return Decoder(model)


MODEL = QwenForCausalLM
