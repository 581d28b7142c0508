"""Log-likelihoods in nats: of continuations after their contexts, and of whole texts."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from megatron_refine.eval.batches import over_replicas, padded
from megatron_refine.platform import hardware
from megatron_refine.trainer import forward
from megatron_refine.trainer.parallel import Ranks

Pair = tuple[list[int], list[int]]
"""Token ids of a context and of its continuation."""
Likelihood = tuple[float, bool]
"""Sum of log-probabilities of a continuation, and whether each of its tokens has the highest logit."""
Found = Callable[[dict[int, Likelihood]], None]
"""Told the likelihoods of each batch, by the pair's number, as soon as they are there."""


def loglikelihoods(
    model: nn.Module, ranks: Ranks, pairs: Sequence[Pair], batch_size: int, found: Found | None = None
) -> list[Likelihood]:
    """Log-likelihood of each continuation after its context; of an empty one 0.

    A context has one token or more: begin an empty one with BOS or EOS. A text is never cut, the state of a fast-weight
    model has no length.

    Args: pairs, the same on every rank; batch_size, pairs a pass and replica.
    Returns: every pair's, on every rank. Raises ValueError where a context is empty.
    """
    for i, (context, _) in enumerate(pairs):
        if not context:
            raise ValueError(f"pair {i}: its context is empty; begin it with the BOS or EOS token")
    done: dict[int, Likelihood] = {}
    lengths = [len(context) + len(after) for context, after in pairs]
    for batch in over_replicas(lengths, batch_size, ranks, lambda mine: _score(model, [pairs[i] for i in mine])):
        done |= batch
        if found:
            found(batch)
    return [done[i] for i in range(len(pairs))]


def text_loglikelihoods(
    model: nn.Module, ranks: Ranks, texts: Sequence[list[int]], first: int, batch_size: int, found: Found | None = None
) -> list[float]:
    """Log-likelihood of each whole text [length >= 0] after the token `first`, BOS or EOS, which is not scored."""
    pairs = [([first], text) for text in texts]
    return [total for total, _ in loglikelihoods(model, ranks, pairs, batch_size, found)]


@torch.no_grad()
def _score(model: nn.Module, pairs: Sequence[Pair]) -> list[Likelihood]:
    tokens, _ = padded([context + after for context, after in pairs], hardware.device())
    scores = forward.score_pass(model, tokens)
    logprobs, correct = scores.logprobs.double().cpu(), scores.correct.cpu()
    rows = [slice(len(context) - 1, len(context) + len(after) - 1) for context, after in pairs]
    return [(float(logprobs[i, row].sum()), bool(correct[i, row].all())) for i, row in enumerate(rows)]
