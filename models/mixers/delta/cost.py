"""What a mixer with a delta-rule memory costs: parameters, matmul FLOPs, bytes. Plain arithmetic.

Letters: h hidden size, H (value) heads, K and V the widths of a head's keys and values, C the chunk of the delta rule.
"""

from dataclasses import dataclass
from typing import ClassVar

from megatron_refine.models.layer import Saved

CHUNK = 64  # tokens a chunk of kernels/delta_rule
FP32 = 4


@dataclass(frozen=True)
class DeltaCost:
    """A `MixerCost`, from the shape of the mixer over all ranks."""

    hidden: int  # h
    heads: int  # H, of the values; keys are repeated for them on a CPU
    key_dim: int  # K
    value_dim: int  # V
    channels: int  # columns of the input projection that pass the convolution
    others: int  # columns that do not
    conv_size: int
    vectors: int = 0  # parameters that are sharded and in no matmul nor convolution
    gated_rule: bool = False  # the delta rule with decay
    gated_output: bool = False
    kernels: ClassVar[str] = "delta_rule"

    @property
    def keys(self) -> int:
        """Columns of the keys, as many as of the queries."""
        return (self.channels - self.heads * self.value_dim) // 2

    def parameters(self, tp: int) -> int:
        projections = self.hidden * (self.channels + self.others) + self.heads * self.value_dim * self.hidden
        return (projections + self.channels * self.conv_size + self.vectors) // tp + self.partial(tp)

    def partial(self, tp: int) -> int:
        """The norm of a head's output."""
        return self.value_dim

    def flops(self, length: int, before: int = 0) -> dict[str, int]:
        """The delta rule in the chunked form of arXiv 2406.06484 section 3: [U|W] = (I + A)^-1 [beta V | beta K],
        u = U - W S, o = q S + tril(q k^T) u, S' = S + k^T u. A stream shorter than a chunk (a branch) is one chunk.
        """
        heads, k, v, chunk = self.heads, self.key_dim, self.value_dim, min(CHUNK, length)
        return {
            "in_proj": 2 * self.hidden * (self.channels + self.others),
            "k k^T": 2 * heads * chunk * k,
            "solve": heads * chunk * (k + v),  # triangular: half a matmul; counters that hook matmuls see 0
            "W S": 2 * heads * k * v,
            "q S": 2 * heads * k * v,
            "q k^T": 2 * heads * chunk * k,
            "(q k^T) u": 2 * heads * chunk * v,
            "k^T u": 2 * heads * k * v,
            "out_proj": 2 * heads * v * self.hidden,
        }

    def fork_flops(self) -> int:
        """The masked product S + k[:r]^T u[:r]."""
        return 2 * self.heads * CHUNK * self.key_dim * self.value_dim

    def state_bytes(self, itemsize: int) -> int:
        """S [H, K, V] in fp32 and the tail of the convolution."""
        return self.heads * self.key_dim * self.value_dim * FP32 + (self.conv_size - 1) * self.channels * itemsize

    def exchanged_columns(self, ranks: int) -> tuple[int, int]:
        """All but the gate; what the heads read."""
        outputs = self.heads * self.value_dim
        return self.channels + self.others - outputs * self.gated_output, outputs

    def handle_bytes(self, itemsize: int, length: int, gpu: bool, cp: int) -> float:
        """The projected rows, for the convolution's tail; keys, what is written and the states before each chunk (a
        GPU: in the precision of the inputs); decays."""
        size, keys = (itemsize, self.keys) if gpu else (FP32, self.heads * self.key_dim)
        rule = self.heads * (self.value_dim * (size + self.key_dim * size / CHUNK) + FP32 * self.gated_rule)
        columns = self.exchanged_columns(cp)[0] if cp > 1 else self.channels + self.others
        return columns * itemsize + keys * size + rule

    def saved_bytes(self, itemsize: int, length: int, gpu: bool) -> Saved:
        """On a CPU what autograd saves around and in the chunked delta rule, which computes in fp32
        (`kernels/delta_rule/chunk.py`); held to measurements by tests. On a GPU what `kernels/delta_rule/fla.py` saves
        (q, k, v, beta and a [C] of (I + A)^-1), the convolution and the gated norm keeping their inputs; counted in
        the sources, never measured.
        """
        heads, k, v = self.heads, self.key_dim, self.value_dim
        columns = self.channels + self.others  # of the input projection
        forked = heads * (k * v + CHUNK * (k + v + k * self.gated_rule)) * FP32  # state, keys and writes of its chunk
        left = heads * v * self.gated_output  # columns of the gate: what travels is beside the whole projection
        travelled = (columns - left) * itemsize * self.gated_output
        if gpu:
            return Saved((columns + self.channels + heads * (CHUNK + 2 * v)) * itemsize, travelled, position=forked)
        mixer = columns + 3 * self.channels  # with the tail in front, before SiLU, after it
        mixer += heads * v * (1 + 2 * self.gated_output)  # what out_proj reads; SiLU of the gate, the norm's output
        rule = heads * (rule_elements(k, v, self.gated_rule) + 2 * v + 4)  # o, x / rms(x); beta and lengths
        rule += 2 * self.keys * (heads * k > self.keys)  # queries and keys before they are repeated
        return Saved(
            mixer * itemsize + rule * FP32, travelled, position=forked, rollout=heads * k * v * FP32 * self.gated_rule
        )


def rule_elements(k: int, v: int, decay: bool) -> int:
    """What autograd keeps of the chunked delta rule, a token and head."""
    kept = 7 * k + 3 * v + 2 * CHUNK + k * v // CHUNK + 1  # q, k, beta k, v, U, W, u, both [C, C], S, beta
    return kept + (3 * k + 3 * CHUNK if decay else 0)  # k, beta k and q with decay; decays and products [C, C]
