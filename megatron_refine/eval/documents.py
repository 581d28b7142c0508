"""Held-out documents: next-token loss and argmax accuracy of a model that is not being trained."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_refine import platform
from megatron_refine.step.objective import next_token_sums
from megatron_refine.trainer import forward
from megatron_refine.trainer.parallel import Ranks


@dataclass(frozen=True)
class DocumentSums:
    """Of one document's first tokens."""

    index: int
    tokens: int  # that are predicted: all but the first
    loss: float  # nats, summed
    correct: int  # tokens with the highest logit


def heldout(
    model: nn.Module, ranks: Ranks, documents: Sequence[list[int]], batch_size: int, skip: frozenset[int] = frozenset()
) -> Iterator[list[DocumentSums]]:
    """Sums of each document [length >= 2], as batches of all replicas get done, the longest first; not of `skip`.

    documents: token ids, BOS included. The same on every rank; every rank gets all sums.
    """
    order = sorted((i for i in range(len(documents)) if i not in skip), key=lambda i: -len(documents[i]))
    step = batch_size * ranks.dp
    for start in range(0, len(order), step):
        mine = order[start : start + step][ranks.dp_rank :: ranks.dp]
        everyone: list[list[DocumentSums]] = [[]] * ranks.dp
        dist.all_gather_object(everyone, _sums(model, documents, mine), group=ranks.dp_group)
        yield sorted((sums for part in everyone for sums in part), key=lambda sums: sums.index)


@torch.no_grad()
def _sums(model: nn.Module, documents: Sequence[list[int]], mine: list[int]) -> list[DocumentSums]:
    if not mine:
        return []
    tokens, lengths = padded([documents[i] for i in mine], platform.device())
    scores = forward.main_pass(model, tokens).scores
    found = []
    for b, index in enumerate(mine):
        row = slice(b, b + 1)
        loss, count = next_token_sums(scores.logprobs[row, :-1], lengths[row])
        hits = scores.correct[b, : int(lengths[b]) - 1].sum()
        found.append(DocumentSums(index, int(count), float(loss), int(hits)))
    return found


def padded(rows: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids as tokens [B, T], right-padded with 0, and their lengths [B]."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for into, row in zip(tokens, rows, strict=True):
        into[: len(row)] = torch.tensor(row)
    return tokens.to(device), lengths.to(device)
