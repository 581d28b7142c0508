"""Delta-rule models for SGLang: the same kernels as in training, states in SGLang's own pools.

SGLang runs a batch as rows end to end: whole prompts or parts of them (extend), or one token of each request (decode).
Every request owns a slot of a pool; a slot holds, for each layer, the memory [H, K, V] and the last W-1 rows before the
convolution. SGLang copies slots where requests share a prefix, keeps those of finished requests, and frees them.

Parameters have the names and shapes of the tensors in Hugging Face's format, one each, so that trainer and server can
compare checksums. Imported by SGLang's processes only; needs no Megatron.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sglang.srt.distributed import divide
from sglang.srt.layers.linear import ColumnParallelLinear, RowParallelLinear
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.model_executor.forward_context import get_attn_backend
from sglang.srt.model_loader.weight_utils import default_weight_loader
from sglang.srt.runtime_context import get_parallel
from torch import Tensor, nn

from megatron_refine.kernels.delta_rule import delta_rule, l2_normalize, packed_delta_rule
from megatron_refine.kernels.short_conv import short_conv
from megatron_refine.models.mixers.delta.slots import StateShape


class Ragged:
    """Rows of N requests end to end. A decoded batch has one of each request."""

    def __init__(self, batch: Any):
        self.lengths: list[int] | None = None  # of each request
        if batch.forward_mode.is_decode_or_idle():
            return
        self.lengths = [int(length) for length in batch.extend_seq_lens_cpu]
        lengths, count = batch.extend_seq_lens, sum(self.lengths)
        numbers = torch.arange(len(self.lengths), device=lengths.device)
        self.numbers = numbers.repeat_interleave(lengths, output_size=count)  # the request of each row
        self.ends = lengths.cumsum(0)

    def batch(self, rows: Tensor) -> Tensor:
        """[R, ...] -> [R, 1, ...] of a decoded batch, else [1, R, ...]: sequences of the kernels."""
        return rows[:, None] if self.lengths is None else rows[None]

    def convolved(self, rows: Tensor, weight: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [R, C] after the convolution, each request's behind its tail [N, W-1, C] -> [R, C], the next tails."""
        width = tail.shape[1]
        if self.lengths is None:
            return short_conv(rows[:, None], weight, tail)[:, 0], torch.cat([tail[:, 1:], rows[:, None]], 1)
        place = torch.arange(len(rows), device=rows.device) + (self.numbers + 1) * width
        before = torch.arange(width, device=rows.device)
        starts = self.ends - self.ends.diff(prepend=self.ends.new_zeros(1))
        shift = torch.arange(len(tail), device=rows.device) * width
        whole = rows.new_empty(len(rows) + tail.shape[0] * width, rows.shape[1])  # tail, rows, tail, rows, ...
        whole[place] = rows
        whole[(starts + shift)[:, None] + before] = tail
        return short_conv(whole[None], weight)[0, place], whole[(self.ends + shift)[:, None] + before]

    def rule(self, state: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The delta rule from a state of each request [N, H, K, V] -> outputs [R, H, V], the next states."""
        if self.lengths is None:
            o, final, _ = delta_rule(**inputs, state=state)
        else:
            o, final = packed_delta_rule(**({"g": None} | inputs), state=state, lengths=self.lengths)  # type: ignore[arg-type]
        return o.flatten(0, 1), final


class Sharded(nn.Module):
    """A weight that is no linear layer of SGLang's, cut along axis 0 over tp."""

    def __init__(self, *shape: int, blocks: Sequence[int] = ()):
        super().__init__()
        self.weight = sharded_parameter(*shape, blocks=blocks)


def sharded_parameter(*shape: int, blocks: Sequence[int] = ()) -> nn.Parameter:
    """This rank's part of a parameter of the whole `shape`, cut along axis 0; blocks: rows that are cut by themselves,
    as in a fused [q | k | v]."""
    parallel = get_parallel()
    parameter = nn.Parameter(torch.empty(divide(shape[0], parallel.tp_size), *shape[1:]), requires_grad=False)

    def load(param: nn.Parameter, whole: Tensor) -> None:
        parts = whole.split(list(blocks) or len(whole))
        param.data.copy_(torch.cat([part.chunk(parallel.tp_size)[parallel.tp_rank] for part in parts]))

    parameter.weight_loader = load  # type: ignore[attr-defined]
    return parameter


class Norm(nn.Module):
    """The norm as trained: statistics in at least fp32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width), requires_grad=False), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def column(width: int, out: int) -> ColumnParallelLinear:
    return ColumnParallelLinear(width, out, bias=False)


class StateMixer(nn.Module):
    """The mixer of a layer on its slots. A subclass projects the rows, and turns them into inputs of the delta rule."""

    def __init__(self, shape: StateShape, layer: int):
        super().__init__()
        self.layer, self.shape = layer, shape

    def columns(self, x: Tensor) -> Tensor:
        """Rows [R, hidden] -> those of queries, keys and values before the convolution [R, C]."""
        raise NotImplementedError

    def taps(self) -> Tensor:
        """Weight of the convolution [C, W]."""
        raise NotImplementedError

    def rule_inputs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, ragged: Ragged) -> dict[str, Tensor]:
        """Rows x [R, hidden] and what the convolution made of them, q, k [N, L, key heads, K] of unit length, v
        [N, L, H, V] -> arguments of delta_rule. N, L: as of `Ragged.batch`."""
        raise NotImplementedError

    def output(self, x: Tensor, o: Tensor) -> Tensor:
        """Outputs [R, H, V] of the delta rule for rows x [R, hidden] -> [R, hidden]."""
        raise NotImplementedError

    def forward(self, x: Tensor, batch: Any, ragged: Ragged) -> Tensor:
        """[R, hidden] -> [R, hidden]; reads and writes the slots of the batch's requests."""
        pool = get_attn_backend().conv_state_metadata(self.layer, batch)
        # a captured batch is padded with rows of slot -1, which is another request's; slot 0 is nobody's
        slots = pool.cache_indices.clamp(min=0)
        conv, memory = pool.layer_cache.conv[0], pool.layer_cache.temporal
        tail, state = conv[slots].mT, memory[slots]
        if pool.has_initial_state is not None:  # a fresh slot may hold another request's state
            fresh = ~pool.has_initial_state
            tail = tail.masked_fill(fresh[:, None, None], 0)
            state = state.masked_fill(fresh[:, None, None, None], 0)
        rows = self.columns(x)
        mixed, tail = ragged.convolved(rows, self.taps(), tail.to(rows.dtype))
        conv[slots] = tail.mT.to(conv.dtype)
        head_dims = (self.shape.key_dim, self.shape.key_dim, self.shape.value_dim)
        parts = ragged.batch(mixed).split([size // get_parallel().tp_size for size in self.shape.blocks], -1)
        q, k, v = (z.unflatten(-1, (-1, d)) for z, d in zip(parts, head_dims, strict=True))
        o, final = ragged.rule(state, self.rule_inputs(x, l2_normalize(q), l2_normalize(k), v, ragged))
        memory[slots] = final.to(memory.dtype)
        return self.output(x, o)


class DeltaAttention(StateMixer):
    """The mixer with a tensor for each projection, as flash-linear-attention names them. A family adds its own."""

    def __init__(self, model: Any, shape: StateShape, layer: int):
        super().__init__(shape, layer)
        hidden = model.hidden_size
        self.q_proj, self.k_proj, self.v_proj = (column(hidden, width) for width in shape.blocks)
        self.q_conv1d, self.k_conv1d, self.v_conv1d = (Sharded(width, 1, shape.conv_size) for width in shape.blocks)
        self.o_norm = Norm(shape.value_dim, model.norm_eps)
        self.o_proj = RowParallelLinear(shape.blocks[-1], hidden, bias=False)

    def columns(self, x: Tensor) -> Tensor:
        return torch.cat([project(x)[0] for project in (self.q_proj, self.k_proj, self.v_proj)], -1)

    def taps(self) -> Tensor:
        return torch.cat([c.weight for c in (self.q_conv1d, self.k_conv1d, self.v_conv1d)])[:, 0]

    def read_out(self, x: Tensor, o: Tensor) -> Tensor:
        """Outputs [R, H, V] of the delta rule, normed; a family may gate them by the rows x [R, hidden]."""
        return self.o_norm(o)

    def output(self, x: Tensor, o: Tensor) -> Tensor:
        return self.o_proj(self.read_out(x, o).to(x.dtype).flatten(-2))[0]


class GatedMLP(nn.Module):
    """down(SiLU(gate x) * up x), columns over tp."""

    def __init__(self, model: Any):
        super().__init__()
        hidden, width = model.hidden_size, model.intermediate_size
        self.gate_proj, self.up_proj = column(hidden, width), column(hidden, width)
        self.down_proj = RowParallelLinear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)[0]) * self.up_proj(x)[0])[0]


class Layer(nn.Module):
    """Norm and mixer, norm and MLP, each with a residual."""

    def __init__(self, model: Any, attention: nn.Module):
        super().__init__()
        self.attn_norm, self.attn = Norm(model.hidden_size, model.norm_eps), attention
        self.mlp_norm, self.mlp = Norm(model.hidden_size, model.norm_eps), GatedMLP(model)

    def forward(self, x: Tensor, batch: Any, ragged: Ragged) -> Tensor:
        x = x + self.attn(self.attn_norm(x), batch, ragged)
        return x + self.mlp(self.mlp_norm(x))


def embedding(model: Any) -> VocabParallelEmbedding:
    # padded no further than tp divides: the checksum of a weight is that of the trainer's rows
    return VocabParallelEmbedding(model.vocab_size, model.hidden_size, padding_size=1)


class Decoder(nn.Module):
    """Token ids [R] -> final-norm rows [R, hidden]."""

    def __init__(self, model: Any, attention: Any):
        """attention(model, layer): the mixer of a layer."""
        super().__init__()
        self.backend: Any = None  # of the last pass
        self.embeddings = embedding(model)
        self.layers = nn.ModuleList(Layer(model, attention(model, i)) for i in range(model.num_layers))
        self.norm = Norm(model.hidden_size, model.norm_eps)

    @property
    def table(self) -> VocabParallelEmbedding:
        return self.embeddings

    def forward(self, tokens: Tensor, positions: Tensor, batch: Any) -> Tensor:
        """positions [R]: not needed, the states know them."""
        self.backend = get_attn_backend()
        ragged, x = Ragged(batch), self.embeddings(tokens)
        for layer in self.layers:
            x = layer(x, batch, ragged)
        return self.norm(x)


class ForCausalLM(nn.Module):
    """What SGLang loads and calls. A family's subclass makes its decoder."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "", **_: Any):
        super().__init__()
        if quant_config is not None:
            raise ValueError("quantized weights are not served; start the server without --quantization")
        model = config.typed_model
        self.model = self.decoder(model)
        self.lm_head = self.model.table
        if not model.tie_embeddings:
            self.lm_head = ParallelLMHead(model.vocab_size, model.hidden_size, padding_size=1)
        self.logits_processor = LogitsProcessor(config)
        self.config, self.shapes = config, config.hf_shapes

    def decoder(self, model: Any) -> Any:
        """Make the module that turns tokens, positions and a batch into rows; its `table` is the embedding."""
        raise NotImplementedError

    def forward(self, input_ids: Tensor, positions: Tensor, forward_batch: Any) -> Any:
        """Token ids [R] at positions [R] -> SGLang's logits of the rows that it asks for."""
        rows = self.model(input_ids, positions, forward_batch)
        return self.logits_processor(input_ids, rows, self.lm_head, forward_batch)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """(name, whole tensor) of the whole model from files, or a list of some of them as sent by a trainer.

        Raises ValueError for a name that is not the model's, a shape that is not the tensor's, a tensor that is missing
        in the files. SGLang's own models skip them in silence. What a trainer did not send, its checksums show.
        """
        parameters, loaded = dict(self.named_parameters()), set()
        for stored, tensor in weights:
            name = self.config.todays_name(stored)
            if name is None:
                continue
            if name not in parameters:
                raise ValueError(f"{stored}: no tensor of this model")
            if tuple(tensor.shape) != self.shapes[name]:
                raise ValueError(f"{stored}: shape {list(tensor.shape)}, the model has {list(self.shapes[name])}")
            parameter = parameters[name]
            if isinstance(weights, list) and _takes_the_place(tensor, parameter):
                parameter.data = tensor
            else:
                getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)
            loaded.add(name)
        missing = sorted(parameters.keys() - loaded)
        if missing and not isinstance(weights, list):
            raise ValueError(f"missing tensors: {', '.join(missing[:3])}" + ", ..." * (len(missing) > 3))
        return loaded


def _takes_the_place(sent: Tensor, parameter: Tensor) -> bool:
    """Whether the memory that a whole weight came in can be the parameter's: not where CUDA graphs know the address."""
    return (
        sent.device.type == "cpu" == parameter.device.type
        and sent.shape == parameter.shape
        and sent.dtype == parameter.dtype
        and sent.is_contiguous()
    )
