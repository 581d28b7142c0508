"""What LaCT's mixer costs: parameters, matmul FLOPs, bytes. Plain arithmetic.

Letters: h hidden size, H fast-weight heads, D = h/H and I their widths.
"""

from dataclasses import dataclass
from typing import ClassVar

from megatron_refine.models.lact.config import LactConfig
from megatron_refine.models.layer import Saved

FP32 = 4
NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True)
class LactCost:
    """A `MixerCost`."""

    model: LactConfig
    kernels: ClassVar[str] = "lact"

    def parameters(self, tp: int) -> int:
        m, h = self.model, self.model.hidden_size
        heads, inner, rank = m.num_lact_heads, m.inner_dim, m.w0_w2_low_rank
        bias = self._columns - (0 if m.qkv_bias else 3 * h)
        whole = h * inner  # of one matrix, all heads
        initial = whole + 2 * (heads * rank * (inner + m.head_dim) if rank > 0 else whole)
        return (h * self._columns + bias + 4 * h + initial + h * h) // tp + self.partial(tp)

    def partial(self, tp: int) -> int:
        """The norm of what a head reads."""
        return self.model.head_dim

    def flops(self, length: int, before: int = 0) -> dict[str, int]:
        """Every chunk but the last is also an update; a stream shorter than a chunk (a branch) only reads."""
        m, h = self.model, self.model.hidden_size
        window = min(m.window_size, length)
        seen = window - window * (window - 1) // (2 * length)  # keys a query sees, on average
        fast = m.num_lact_heads * m.head_dim * m.inner_dim
        updates = -(-length // m.lact_chunk_size) - 1
        trained = updates * m.lact_chunk_size / length  # share of the tokens
        small, large = sorted((m.head_dim, m.inner_dim))
        gram = 2 * small * small * large + 2 * small**3 + 2 * small * small * large  # X X^T, its square, times X
        muon = 3 * NEWTON_SCHULZ_STEPS * m.num_lact_heads * gram if m.use_muon else 0
        return {
            "in_proj": 2 * h * self._columns,
            "window": 4 * seen * h,
            "read": 6 * fast,
            "update": round(12 * fast * trained),
            "muon": round(muon * updates / length),
            "out_proj": 2 * h * h,
        }

    def fork_flops(self) -> int:
        """None: a branch shares the weights of its chunk."""
        return 0

    def state_bytes(self, itemsize: int) -> int:
        """The weights that it reads, the window's keys and values."""
        return (self._matrices + 2 * (self.model.window_size - 1) * self.model.hidden_size) * itemsize

    def exchanged_columns(self, ranks: int) -> tuple[int, int]:
        return self._columns, self.model.hidden_size

    def handle_bytes(self, itemsize: int, length: int, gpu: bool, cp: int) -> float:
        """Keys and values of the attention, keys twice and values of the fast weights, their rates and momenta; at each
        chunk the weights as used, as they add up and as they move."""
        m = self.model
        updates = -(-length // m.lact_chunk_size) - 1
        weights = (updates * (itemsize + 2 * FP32) + FP32) * self._matrices / length
        return 5 * m.hidden_size * itemsize + 4 * m.num_lact_heads * FP32 + weights

    def saved_bytes(self, itemsize: int, length: int, gpu: bool) -> Saved:
        """Around and in `kernels/lact`. On a CPU held to measurements by tests; on a GPU (compiled chains keep their
        inputs, FlexAttention its own) counted in the sources."""
        m = self.model
        h, inner, window = m.hidden_size, m.num_lact_heads * m.inner_dim, m.window_size
        updates = -(-length // m.lact_chunk_size) - 1
        trained = min(1.0, updates * m.lact_chunk_size / length)  # share of the tokens
        attended = -(-length // window) * window if length > window else length
        # queries, keys twice and values of the fast weights, what was read of them and its sum with the attention; on a
        # CPU also their queries and keys in and after SiLU, the norm of what was read, its product with the scale
        mixer = self._columns + (6 if gpu else 12) * h
        attention = 4 * h * attended / length  # q, k, v and what is read
        if not gpu:
            attention += 4 * h * max(0, attended - window) / length  # keys and values of two windows side by side
        fast = (2 + 3 * trained) * inner  # gate, up; for the update also the gradient of their product
        angles = (2 if m.ttt_nope else 4) * length * h // m.num_attn_heads * FP32  # cosines and sines
        mask = 2 * window * window * FP32 if length > window else 0
        return Saved(
            heads=(mixer + attention + fast) * itemsize + self._saved_matrices(updates, itemsize, gpu) / length,
            fixed=0 if gpu else angles + mask,
            position=2 * (window - 1) * h * itemsize,  # keys and values before a branch
        )

    def _saved_matrices(self, updates: int, itemsize: int, gpu: bool) -> int:
        """Bytes of the fast weights, and of what their updates keep, a sequence."""
        each = 2 * itemsize + FP32  # as used, by the chunks' reads and by the update; as they add up
        each += FP32 * self.model.use_momentum  # what moved
        each += (itemsize if gpu else FP32) * self.model.use_muon  # what Muon starts from
        return (updates * each + FP32) * self._matrices

    @property
    def _matrices(self) -> int:
        """Elements of the fast weights."""
        return 3 * self.model.num_lact_heads * self.model.head_dim * self.model.inner_dim

    @property
    def _columns(self) -> int:
        extra = 3 + int(self.model.use_momentum) + int(self.model.learnable_ttt_scale)
        return 3 * self.model.hidden_size + self.model.num_lact_heads * extra
