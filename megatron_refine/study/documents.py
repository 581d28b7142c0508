"""Texts of a made-up language: filler, in which values are stored under keys and asked for later.

Filler is a Markov chain of order one, three successors a word. The first half of a text has `pairs` times
`store KEY v v v v`, the second half asks for each of them once: `query KEY v v v v`. A word is a token.
"""

import json
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from random import Random

from pydantic import Field

from megatron_refine.config import Section
from megatron_refine.files import write_json, write_rows

ENDS, STORE, QUERY = "</s>", "store", "query"
SUCCESSORS = (0.7, 0.2, 0.1)


class Documents(Section):
    """Sizes of the language and of its texts."""

    keys: int = Field(48, ge=1)
    values: int = Field(64, ge=1)
    filler: int = Field(60, ge=3)
    span: int = Field(4, ge=1, description="words of a value")
    pairs: int = Field(12, ge=1, description="keys of a text")
    length: int = Field(256, ge=8, description="words of a text")
    held_out: int = Field(192, ge=1, description="texts that nothing learns from")
    asked: int = Field(4, ge=1, description="questions of each held-out text, whose answers are written")

    @property
    def words(self) -> list[str]:
        """All words, in the order of their ids."""
        kinds = (("k", self.keys), ("v", self.values), ("f", self.filler))
        return [ENDS, "<unk>", STORE, QUERY, *(f"{kind}{i}" for kind, number in kinds for i in range(number))]


@dataclass(frozen=True)
class Text:
    """A text, and where its questions end."""

    words: list[str]
    questions: list[int]  # places of the first word of each answer


class Language:
    """One chain of filler; texts of it."""

    def __init__(self, sizes: Documents, seed: int):
        self.sizes, rng = sizes, Random(f"language {seed}")
        names = [f"f{i}" for i in range(sizes.filler)]
        self.successors = {name: rng.sample(names, len(SUCCESSORS)) for name in names}
        self.weights = list(accumulate(SUCCESSORS))

    def text(self, rng: Random) -> Text:
        """Write one text."""
        s = self.sizes
        number = s.length - 2 * s.pairs * (2 + s.span)
        filler = self._filler(rng, number)
        keys = rng.sample(range(s.keys), s.pairs)
        values = {key: [f"v{rng.randrange(s.values)}" for _ in range(s.span)] for key in keys}
        order, half = rng.sample(keys, s.pairs), number // 2
        items = [(STORE, key, place) for key, place in zip(keys, _places(rng, 0, half, s.pairs), strict=True)]
        items += [(QUERY, key, place) for key, place in zip(order, _places(rng, half, number, s.pairs), strict=True)]
        words, questions, used = list[str](), list[int](), 0
        for kind, key, place in items:
            words += [*filler[used:place], kind, f"k{key}"]
            used = place
            if kind == QUERY:
                questions.append(len(words))
            words += values[key]
        return Text(words + filler[used:], questions)

    def _filler(self, rng: Random, number: int) -> list[str]:
        word, found = f"f{rng.randrange(self.sizes.filler)}", list[str]()
        for _ in range(number):
            found.append(word)
            word = rng.choices(self.successors[word], cum_weights=self.weights)[0]
        return found


def _places(rng: Random, low: int, high: int, number: int) -> list[int]:
    """Sorted places in the filler before which something stands."""
    return sorted(rng.randint(low, high) for _ in range(number))


def write_texts(language: Language, path: Path, number: int, seed: str) -> None:
    """Write so many texts, a JSON object each."""
    rng = Random(seed)
    write_rows(path, ({"text": " ".join(language.text(rng).words)} for _ in range(number)))


def write_held_out(language: Language, texts: Path, prompts: Path, seed: str) -> None:
    """Write texts of a seed of their own, and questions of each: the text up to them, and the value as the answer."""
    sizes, rng = language.sizes, Random(seed)
    found = [language.text(rng) for _ in range(sizes.held_out)]
    write_rows(texts, ({"text": " ".join(text.words)} for text in found))
    rows = [
        {"prompt": " ".join(text.words[:place]), "answer": " ".join(text.words[place : place + sizes.span])}
        for text in found
        for place in text.questions[: sizes.asked]
    ]
    write_rows(prompts, rows)


def write_tokenizer(sizes: Documents, path: Path) -> None:
    """Write a tokenizer.json whose tokens are the words."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(sizes.words)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(ENDS, special=True)])
    write_json(path, json.loads(tokenizer.to_str()))
