"""Which rows of a forward pass are main tokens, which are branches, and from which positions the branches start.

One pass may hold the main stream alone (scoring), branches alone (decoding and rescoring, from forked states), or both
(the packed update). Rows run along Megatron's sequence axis, in this order, for each of the B sequences side by side:

    [ T main rows | branch (chunk 0, rollout 0): k rows | (0, 1): k rows | ... | (c-1, n-1): k rows | padding to the tp
    size ]

The layout rides to every layer as `packed_seq_params`, which Megatron hands on unchanged, through recomputation too.
"""

from dataclasses import dataclass, field
from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_refine.kernels.places import Places


@dataclass
class Branches(PackedSeqParams):
    """The layout of one pass. P = B * c positions, sequence-major; immutable but for what it collects."""

    main_len: int = 0  # T, main rows a sequence; 0: branches only
    num_positions: int = 0  # c, a sequence
    num_rollouts: int = 1  # n, a position
    branch_len: int = 0  # k, rows a branch
    places: Places | None = None  # where the P branches of a main stream start
    states: dict[int, Any] | None = None  # branches only: layer number -> State of P positions
    handles: dict[int, Any] | None = None  # main only: a dict to collect each layer's handle
    final_states: dict[int, Any] | None = None  # branches only: a dict to collect each layer's state after the last row

    qkv_format: str = field(default="sbhd", init=False)

    @property
    def branch_rows(self) -> int:
        """Branch rows a sequence, c * n * k."""
        return self.num_positions * self.num_rollouts * self.branch_len

    @property
    def num_rows(self) -> int:
        """Rows a sequence, without padding."""
        return self.main_len + self.branch_rows

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """[S, B, ...] -> main rows [B, T, ...] and branch rows [P * n, k, ...], sequence-major.

        One split, so that the backward pass writes one gradient of all rows instead of padding and adding two.
        """
        total, padding = len(rows), len(rows) - self.num_rows
        if total in (self.main_len, self.branch_rows):  # nothing to split, and no gradient to copy
            main, branches = (rows, rows[:0]) if self.main_len else (rows[:0], rows)
        else:
            main, branches, _ = rows.split([self.main_len, self.branch_rows, padding])
        folded = branches.transpose(0, 1).unflatten(1, (-1, max(self.branch_len, 1)))
        return main.transpose(0, 1), folded.flatten(0, 1)

    def to_rows(self, branches: Tensor, num_sequences: int) -> Tensor:
        """The inverse, for B sequences: [P * n, k, ...] -> [c * n * k, B, ...]."""
        return branches.unflatten(0, (num_sequences, -1)).flatten(1, 2).transpose(0, 1)
