"""Texts of many lengths in batches: over the replicas, with little padding."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from megatron_refine.exchange import everyone
from megatron_refine.trainer.parallel import Ranks

Result = TypeVar("Result")


def over_replicas(
    lengths: Sequence[int],
    batch_size: int,
    ranks: Ranks,
    run: Callable[[list[int]], Sequence[Result]],
    skip: frozenset[int] = frozenset(),
) -> Iterator[dict[int, Result]]:
    """Results by the text's number, as batches of all replicas get done; the longest first, equal lengths together.

    run(numbers): results of at most `batch_size` texts, on all ranks of a replica; numbers, texts, tuples of them.
    Numbers in `skip` are left out.
    Every rank calls this with the same arguments and gets all results.
    """
    order = sorted((i for i in range(len(lengths)) if i not in skip), key=lambda i: -lengths[i])
    step = batch_size * ranks.dp
    for start in range(0, len(order), step):
        mine = order[start : start + step][ranks.dp_rank :: ranks.dp]
        found = dict(zip(mine, run(mine) if mine else [], strict=True))
        yield {i: result for part in everyone(found, ranks.dp_group) for i, result in part.items()}


def padded(rows: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids as tokens [B, T], right-padded with 0, and their lengths [B]."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for into, row in zip(tokens, rows, strict=True):
        into[: len(row)] = torch.tensor(row)
    return tokens.to(device), lengths.to(device)
