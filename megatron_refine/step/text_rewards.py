"""Rewards that read the text of a rollout, as the paper suggests (arXiv 2602.16704, section 6). They need nltk.

    refine.reward=megatron_refine.step.text_rewards:edit_similarity
    refine.reward=megatron_refine.step.text_rewards:ngram_overlap
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from megatron_refine.config import ConfigError

Decode = Callable[[list[int]], str]


def edit_similarity(tokens: Tensor, truth: Tensor, h_pred: Tensor, h_true: Tensor, *, decode: Decode) -> Tensor:
    """1 - d / the longer length, d the Levenshtein distance in characters; 1 where both are empty: [B, c, n] in [0, 1].

    Shapes as for `reward.cosine`. decode: token ids to text.
    """
    distance = _nltk("edit_distance")

    def similarity(written: str, true: str) -> float:
        longest = max(len(written), len(true))
        return 1 - distance(written, true) / longest if longest else 1.0

    return _of_texts(similarity, tokens, truth, decode)


def ngram_overlap(
    tokens: Tensor, truth: Tensor, h_pred: Tensor, h_true: Tensor, *, decode: Decode, size: int = 3
) -> Tensor:
    """Share of the rollout's n-grams of `size` characters that the true text has (Jaccard): [B, c, n] in [0, 1].

    Text shorter than `size` is one n-gram. Shapes as for `reward.cosine`.
    """
    distance, ngrams = _nltk("jaccard_distance"), _nltk("ngrams")

    def overlap(written: str, true: str) -> float:
        parts = [{"".join(gram) for gram in ngrams(text, size)} or {text} for text in (written, true)]
        return 1 - distance(*parts)

    return _of_texts(overlap, tokens, truth, decode)


def _of_texts(score: Callable[[str, str], float], tokens: Tensor, truth: Tensor, decode: Decode) -> Tensor:
    true = [decode(ids) for ids in truth.flatten(0, 1).tolist()]
    written = [[decode(ids) for ids in rollouts] for rollouts in tokens.flatten(0, 1).tolist()]
    found = [[score(text, own) for text in texts] for texts, own in zip(written, true, strict=True)]
    return torch.tensor(found, dtype=torch.float32, device=tokens.device).view(tokens.shape[:-1])


def _nltk(name: str) -> Any:
    try:
        module = import_module("nltk.util" if name == "ngrams" else "nltk.metrics.distance")
    except ImportError:
        raise ConfigError("refine.reward: the rewards that read text need nltk; pip install nltk") from None
    return getattr(module, name)
