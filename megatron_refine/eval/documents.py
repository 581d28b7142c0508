"""Held-out documents: next-token loss and argmax accuracy of a model that is not being trained."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from megatron_refine.eval.batches import over_replicas, padded
from megatron_refine.platform import hardware
from megatron_refine.step.objective import next_token_sums
from megatron_refine.trainer import forward
from megatron_refine.trainer.parallel import Ranks


@dataclass(frozen=True)
class DocumentSums:
    """Sums over one document's first tokens."""

    index: int
    tokens: int  # that are predicted: all but the first
    loss: float  # nats, summed
    correct: int  # tokens with the highest logit


def heldout(
    model: nn.Module, ranks: Ranks, documents: Sequence[list[int]], batch_size: int, skip: frozenset[int] = frozenset()
) -> Iterator[dict[int, DocumentSums]]:
    """Sums of each document [length >= 2] by its number, as batches of all replicas get done; not of `skip`.

    documents: token ids, BOS included. The same on every rank; every rank gets all sums.
    """
    lengths = [len(document) for document in documents]
    for found in over_replicas(lengths, batch_size, ranks, lambda mine: _sums(model, documents, mine), skip):
        yield {index: DocumentSums(index, *sums) for index, sums in found.items()}


@torch.no_grad()
def _sums(model: nn.Module, documents: Sequence[list[int]], mine: list[int]) -> list[tuple[int, float, int]]:
    tokens, lengths = padded([documents[i] for i in mine], hardware.device())
    scores = forward.score_pass(model, tokens)
    found = []
    for b in range(len(mine)):
        row = slice(b, b + 1)
        loss, count = next_token_sums(scores.logprobs[row, :-1], lengths[row])
        hits = scores.correct[b, : int(lengths[b]) - 1].sum()
        found.append((int(count), float(loss), int(hits)))
    return found
