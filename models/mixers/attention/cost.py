"""What a softmax attention layer costs: parameters, matmul FLOPs, bytes. Plain arithmetic.

Letters: h hidden size, H query heads, G key heads, d the width of a head.
"""

from dataclasses import dataclass
from typing import ClassVar

from megatron_refine.models.layer import Saved
from megatron_refine.models.mixers.attention.config import AttentionConfig

FP32 = 4


@dataclass(frozen=True)
class AttentionCost:
    """A `MixerCost`."""

    layer: AttentionConfig
    kernels: ClassVar[str] = "softmax_attention"

    def parameters(self, tp: int) -> int:
        """Where tp does not divide the key heads, every rank has their rows whole."""
        c, whole = self.layer, self.layer.kv_heads % tp != 0
        keys = 2 * c.kv_heads * c.head_dim * c.hidden // (1 if whole else tp)
        own = (c.heads * c.query_width * c.hidden + c.hidden * c.heads * c.head_dim) // tp
        if c.qk_norm == "projection":
            own += c.heads * c.head_dim // tp + c.kv_heads * c.head_dim // (1 if whole else tp)
        return own + keys + 2 * c.head_dim * (c.qk_norm == "head")

    def partial(self, tp: int) -> int:
        c, whole = self.layer, self.layer.kv_heads % tp != 0
        found = 2 * c.head_dim * (c.qk_norm == "head")
        if whole:
            found += c.kv_heads * c.head_dim * (2 * c.hidden + (c.qk_norm == "projection"))
        return found

    def flops(self, length: int, before: int = 0) -> dict[str, int]:
        """A token sees those before its stream and, on average, half of its stream."""
        c = self.layer
        seen = before + (length + 1) / 2
        return {
            "in_proj": 2 * c.hidden * (c.heads * c.query_width + 2 * c.kv_heads * c.head_dim),
            "attention": round(4 * c.heads * c.head_dim * seen),
            "out_proj": 2 * c.heads * c.head_dim * c.hidden,
        }

    def fork_flops(self) -> int:
        """None: branches read the keys of the stream where they lie."""
        return 0

    def state_bytes(self, itemsize: int) -> int:
        """None, for the same reason; the keys of a branch's own few rows are not counted."""
        return 0

    def exchanged_columns(self, ranks: int) -> tuple[int, int]:
        """Queries, keys and values, some of these repeated where there are fewer than ranks; what the heads read."""
        c = self.layer
        return c.heads * c.head_dim + 2 * c.units(ranks) * c.head_dim, c.heads * c.head_dim

    def handle_bytes(self, itemsize: int, length: int, gpu: bool, cp: int) -> float:
        """Keys and values."""
        return 2 * self.layer.kv_heads * self.layer.head_dim * itemsize

    def saved_bytes(self, itemsize: int, length: int, gpu: bool) -> Saved:
        """The projected rows; queries, keys and values as they are multiplied; what was read, its log-sum-exp, and what
        the output layer takes; once the weights side by side. On a CPU also what each step between has made, held to
        measurements by tests; on a GPU compiled chains keep their inputs, which is counted in the sources."""
        c, normed = self.layer, self.layer.qk_norm != "none"
        read, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
        columns = c.heads * c.query_width + 2 * keys
        mixer = columns + 2 * keys + (2 + c.gate if gpu else 3 + 2 * normed + c.gate) * read
        if not gpu:
            mixer += normed * keys
        return Saved(mixer * itemsize + c.heads * FP32, fixed=columns * c.hidden * itemsize)
