"""The entropy of each token of a text under a model, and where rollouts would start (arXiv 2602.16704, figure E.2)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from megatron_refine.data.tokenizer import Tokenizer
from megatron_refine.platform import hardware
from megatron_refine.step.select import position_chances, smoothed_entropy, usable
from megatron_refine.trainer import forward


@dataclass(frozen=True)
class Rule:
    """How positions are selected, by entropy; the configuration's section `refine` explains each."""

    chunks: int = 8
    rollout_len: int = 5
    margin: int = 20
    temperature: float = 1.0


@dataclass(frozen=True)
class Profile:
    """Holds a number for each token of a text, [T] float64. The first token has no entropy: nan."""

    entropy: np.ndarray  # nats, of predicting this token from those before it
    smoothed: np.ndarray
    chance: np.ndarray  # that a rollout starts with this token; 0 in a text that is too short for rollouts
    borders: list[int]  # the first token of each chunk, and the first after the last one; [] likewise


@torch.no_grad()
def profile(model: nn.Module, tokens: Sequence[int], rule: Rule) -> Profile:
    """Pass over tokens [T >= 2] once; on every rank."""
    scores = forward.score_pass(model, torch.tensor([tokens], device=hardware.device()))
    return selected(scores.entropy.double().cpu(), rule)


def selected(entropy: Tensor, rule: Rule) -> Profile:
    """What the selection makes of the entropy [1, T] of predicting the token after each."""
    lengths = torch.tensor([entropy.shape[1]])
    smoothed, chance, borders = smoothed_entropy(entropy, lengths, rule.rollout_len), torch.zeros_like(entropy), []
    if usable(lengths, rule.chunks, rule.margin, rule.rollout_len).all():
        chance = position_chances(
            entropy, lengths, rule.chunks, rollout_len=rule.rollout_len, margin=rule.margin,
            temperature=rule.temperature,
        )  # fmt: skip
        size = entropy.shape[1] // rule.chunks
        borders = [1 + size * i for i in range(rule.chunks + 1)]  # index t is that of predicting token t + 1
    return Profile(_shifted(entropy), _shifted(smoothed), chance[0].numpy(), borders)


def _shifted(values: Tensor) -> np.ndarray:
    """From [1, T] by the token before to [T] by the token that is predicted."""
    return np.concatenate([[np.nan], values[0, :-1].numpy()])


def pieces(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    """The text that each token adds behind the one before it: alone, a sentencepiece tokenizer drops its blank."""
    pairs = [tokens[max(i - 1, 0) : i + 1] for i in range(len(tokens))]
    return [
        tokenizer.decode(pair)[len(tokenizer.decode(pair[:-1])) :] if pair[1:] else tokenizer.decode(pair)
        for pair in pairs
    ]
