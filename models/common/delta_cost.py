"""What a model with delta-rule mixers costs: parameters, matmul FLOPs, bytes. Plain arithmetic.

A multiply-add counts 2 FLOPs. Norms, activations and the depthwise convolution are no matmuls and are left out.
Letters: h hidden size, H (value) heads, K and V the widths of a head's keys and values, C the chunk of the delta rule.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_refine.config import ModelConfig
from megatron_refine.models.common import cost
from megatron_refine.models.common.cost import head_flops, rank_parameters
from megatron_refine.models.family import Saved

CHUNK = 64  # tokens a chunk of kernels/delta_rule
FP32 = 4


@dataclass(frozen=True)
class DeltaShape:
    """A family's mixer, over all ranks."""

    heads: int  # H, of the values; keys are repeated for them on a CPU
    key_dim: int  # K
    value_dim: int  # V
    channels: int  # columns of the input projection that pass the convolution
    others: int  # columns that do not
    conv_size: int
    vectors: int = 0  # parameters a layer that are sharded and in no matmul nor convolution
    gated_rule: bool = False  # the delta rule with decay
    gated_output: bool = False

    @property
    def keys(self) -> int:
        """Columns of the keys, as many as of the queries."""
        return (self.channels - self.heads * self.value_dim) // 2


def rule_elements(k: int, v: int, decay: bool) -> int:
    """What autograd keeps of the chunked delta rule, a token and head."""
    kept = 7 * k + 3 * v + 2 * CHUNK + k * v // CHUNK + 1  # q, k, beta k, v, U, W, u, both [C, C], S, beta
    return kept + (3 * k + 3 * CHUNK if decay else 0)  # k, beta k and q with decay; decays and products [C, C]


class DeltaCost:
    """The functions of `models/<family>/flops.py`; `shape` reads the family's configuration."""

    def __init__(self, shape: Callable[[Any], DeltaShape]):
        self.shape = shape

    def parameters(self, model: ModelConfig) -> int:
        """Trained parameters of the whole model, vocabulary padding included."""
        return self.rank_parameters(model, tp=1, pp=1, stage=0)

    def rank_parameters(self, model: ModelConfig, tp: int, pp: int, stage: int) -> int:
        """Trained parameters of each tensor parallel rank of one pipeline stage."""
        shape, sharded = self.shape(model), self._sharded_of_layer(model)
        return rank_parameters(model, tp, pp, stage, sharded=sharded, head_norm=shape.value_dim)

    def layer_flops(self, model: ModelConfig, length: int) -> dict[str, int]:
        """Forward FLOPs of a layer, a token of a stream of `length` tokens, by matmul.

        The delta rule is in the chunked form of arXiv 2406.06484 section 3: [U|W] = (I + A)^-1 [beta V | beta K],
        u = U - W S, o = q S + tril(q k^T) u, S' = S + k^T u. A stream shorter than a chunk (a branch) is one chunk.
        """
        s, h = self.shape(model), model.hidden_size
        heads, k, v, chunk = s.heads, s.key_dim, s.value_dim, min(CHUNK, length)
        return {
            "in_proj": 2 * h * (s.channels + s.others),
            "k k^T": 2 * heads * chunk * k,
            "solve": heads * chunk * (k + v),  # triangular: half a matmul; counters that hook matmuls see 0
            "W S": 2 * heads * k * v,
            "q S": 2 * heads * k * v,
            "q k^T": 2 * heads * chunk * k,
            "(q k^T) u": 2 * heads * chunk * v,
            "k^T u": 2 * heads * k * v,
            "out_proj": 2 * heads * v * h,
            "mlp": 6 * h * model.intermediate_size,
        }

    def fork_flops(self, model: ModelConfig) -> int:
        """Forward FLOPs of a layer to read the state at one position: the masked product S + k[:r]^T u[:r]."""
        s = self.shape(model)
        return 2 * s.heads * CHUNK * s.key_dim * s.value_dim

    def head_flops(self, model: ModelConfig) -> int:
        """Forward FLOPs of the output layer, a row."""
        return head_flops(model)

    def state_bytes(self, model: ModelConfig, itemsize: int) -> int:
        """Bytes of a layer's state at one position: S [H, K, V] in fp32 and the tail of the convolution."""
        s = self.shape(model)
        return s.heads * s.key_dim * s.value_dim * FP32 + (s.conv_size - 1) * s.channels * itemsize

    def head_norm_width(self, model: ModelConfig) -> int:
        """Width of the norm of a head's output."""
        return self.shape(model).value_dim

    def exchanged_columns(self, model: ModelConfig) -> tuple[int, int]:
        """All but the gate; what the heads read."""
        s = self.shape(model)
        outputs = s.heads * s.value_dim
        return s.channels + s.others - outputs * s.gated_output, outputs

    def handle_bytes(self, model: ModelConfig, itemsize: int, length: int, gpu: bool, cp: int) -> float:
        """The projected rows, for the convolution's tail; keys, what is written and the states before each chunk (a
        GPU: in the precision of the inputs); decays."""
        s = self.shape(model)
        size, keys = (itemsize, s.keys) if gpu else (FP32, s.heads * s.key_dim)
        rule = s.heads * (s.value_dim * (size + s.key_dim * size / CHUNK) + FP32 * s.gated_rule)
        columns = self.exchanged_columns(model)[0] if cp > 1 else s.channels + s.others
        return columns * itemsize + keys * size + rule

    def saved_bytes(self, model: ModelConfig, itemsize: int, length: int, gpu: bool) -> Saved:
        """Bytes kept for the backward pass of a layer.

        On a CPU what autograd saves around and in the chunked delta rule, which computes in fp32
        (`kernels/delta_rule/chunk.py`); held to measurements by tests. On a GPU what `kernels/delta_rule/fla.py` saves
        (q, k, v, beta and a [C] of (I + A)^-1), the convolution and the gated norm keeping their inputs; counted in
        the sources, never measured.
        """
        s = self.shape(model)
        heads, k, v = s.heads, s.key_dim, s.value_dim
        frame = cost.saved_frame(model, gpu)
        columns = s.channels + s.others  # of the input projection
        forked = heads * (k * v + CHUNK * (k + v + k * s.gated_rule)) * FP32  # state, keys and writes of its chunk
        left = heads * v * s.gated_output  # columns of the gate: what travels is beside the whole projection
        travelled = (columns - left) * itemsize * s.gated_output
        if gpu:
            mixer = columns + s.channels + heads * (CHUNK + 2 * v)
            return Saved(frame.rows * itemsize, mixer * itemsize, frame.mlp * itemsize, travelled, position=forked)
        mixer = columns + 3 * s.channels  # with the tail in front, before SiLU, after it
        mixer += heads * v * (1 + 2 * s.gated_output)  # what out_proj reads; SiLU of the gate, the norm's output
        rule = heads * (rule_elements(k, v, s.gated_rule) + 2 * v + 4)  # o, x / rms(x); beta and lengths
        return Saved(
            frame.rows * itemsize, mixer * itemsize + rule * FP32, frame.mlp * itemsize, travelled,
            position=forked, rollout=heads * k * v * FP32 * s.gated_rule,
        )  # fmt: skip

    def _sharded_of_layer(self, model: ModelConfig) -> int:
        s, h = self.shape(model), model.hidden_size
        projections = h * (s.channels + s.others) + s.heads * s.value_dim * h
        return projections + s.channels * s.conv_size + s.vectors + 3 * h * model.intermediate_size
