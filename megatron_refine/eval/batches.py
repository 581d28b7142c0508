"""Texts of many lengths in batches: over the replicas, with little padding."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

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

    run(numbers): results of at most `batch_size` texts, on all ranks of a replica. Numbers in `skip` are left out.
    Every rank calls this with the same arguments and gets all results.
    """
    order = sorted((i for i in range(len(lengths)) if i not in skip), key=lambda i: -lengths[i])
    step = batch_size * ranks.dp
    for start in range(0, len(order), step):
        mine = order[start : start + step][ranks.dp_rank :: ranks.dp]
        found = dict(zip(mine, run(mine) if mine else [], strict=True))
        everyone: list[dict[int, Result]] = [{}] * ranks.dp
        dist.all_gather_object(everyone, found, group=ranks.dp_group)
        yield {i: result for part in everyone for i, result in part.items()}


def padded(rows: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids as tokens [B, T], right-padded with 0, and their lengths [B]."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for into, row in zip(tokens, rows, strict=True):
        into[: len(row)] = torch.tensor(row)
    return tokens.to(device), lengths.to(device)
