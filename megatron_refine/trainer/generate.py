"""Continuations of prompts: one pass over the prompts, then a token at a time from each prompt's own state.

A state has one size however long the prompt or the answer is, so that memory does not grow with what is written.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_refine.kernels.places import Places
from megatron_refine.trainer import forward, random
from megatron_refine.trainer.model import unwrap
from megatron_refine.trainer.parallel import from_last_stage
from megatron_refine.trainer.pipeline import Link
from megatron_refine.trainer.rows import Rows, sample

Finished = Callable[[int, list[int]], bool]
"""finished(sequence, its new tokens) -> whether it needs no more. The same on every rank, or the ranks part ways."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The draws of a prompt are a function of the seed and its number, whatever its batch is."""

    temperature: float = 0.0  # 0: the most probable token, the lowest id of equal ones
    top_p: float = 1.0
    seed: int = 0


GREEDY = Sampling()


@torch.no_grad()
def generate(
    model: nn.Module, tokens: Tensor, lengths: Tensor, max_new: Sequence[int], finished: Finished,
    sampling: Sampling = GREEDY, numbers: Sequence[int] = (),
) -> list[list[int]]:  # fmt: skip
    """Write a token after each prompt, and so on.

    Args: tokens [B, T], right-padded; lengths [B] >= 1, tokens of each prompt; max_new [B] >= 1, most tokens to write;
    numbers [B], of the prompts for their draws, by default their places.
    Returns: the new tokens of each prompt, the one that finished it included. The same at any layout but for rounding.
    """
    everyone = torch.arange(len(tokens), device=tokens.device)
    rows, handles = forward.prefill(model, tokens)
    places = Places.read(everyone, lengths)
    states = {layer: handles.pop(layer).at(places) for layer in list(handles)}
    inner, link = unwrap(model), Link(unwrap(model))
    rows = Rows.of(inner, rows.take(lengths - 1, everyone)[:, None])
    written: list[list[int]] = [[] for _ in max_new]
    open_, drawn = set(range(len(max_new))), torch.as_tensor(numbers, device=tokens.device) if numbers else everyone
    steps = 0
    while True:
        token = torch.zeros_like(lengths)
        if link.stage == link.last:
            uniform = random.uniform(sampling.seed, random.TEXT, drawn, steps)
            token, _ = sample(inner, rows.span(len(tokens)), uniform, sampling.temperature, sampling.top_p)
        steps += 1
        token = from_last_stage(token, inner.pg_collection.pp)
        for i, new in enumerate(token.tolist()):
            if i in open_:
                written[i].append(new)
                if len(written[i]) == max_new[i] or finished(i, written[i]):
                    open_.discard(i)
        if not open_:
            return written
        rows, states = forward.decode_step(model, token, states, link)
        link.wait()
