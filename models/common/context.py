"""Context parallelism around a mixer: from shards of the sequence with all heads to the whole sequence of some heads.

    projected rows [S/cp, B, heads, *]  --to_heads-->  [S, B, heads/cp, *]  mixer  --to_rows-->  [S/cp, B, heads, *]

Each is one all-to-all, and the other one's gradient (DeepSpeed-Ulysses, arXiv 2309.14509). Shards are contiguous: a
recurrence has no use for the zigzag that balances causal attention.
"""

from typing import Any

from megatron.core.tensor_parallel.mappings import all_to_all
from torch import Tensor


def to_heads(rows: Tensor, group: Any) -> Tensor:
    """[S/cp, B, heads, *], this rank's rows -> [S, B, heads/cp, *], all rows, this rank's heads."""
    if group.size() == 1:
        return rows
    parts = rows.unflatten(2, (group.size(), -1)).movedim(2, 0)  # one a receiver
    return all_to_all(group, parts.contiguous()).flatten(0, 1)


def to_rows(mixed: Tensor, group: Any) -> Tensor:
    """The inverse: [S, B, heads/cp, *] -> [S/cp, B, heads, *]."""
    if group.size() == 1:
        return mixed
    parts = mixed.unflatten(0, (group.size(), -1))
    return all_to_all(group, parts.contiguous()).movedim(0, 2).flatten(2, 3)
