"""Needles in a haystack: find the values of the keys that the question names (RULER, section 3 and appendix B).

The wording of the prompts is RULER's (scripts/data/synthetic/constants.py), which comparisons need.
"""

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

from megatron_refine.eval.ruler.haystack import NOISE, Prose
from megatron_refine.eval.ruler.sample import Case, Sample, spread
from megatron_refine.eval.ruler.words import ADJECTIVES, NOUNS

ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n{context}\nWhat is the special magic {kind} for {query} mentioned in the provided text? "
    "The special magic {kind} for {query} mentioned in the provided text is"
)
MANY = (
    "Some special magic {kind}s are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind}s afterwards.\n{context}\nWhat are all the special magic {kind}s for {query} mentioned in the provided "
    "text? The special magic {kind}s for {query} mentioned in the provided text are"
)
NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
_DEPTHS = [round(100 * i / 39) for i in range(40)]  # per cent of the essays' sentences

Kind = Literal["word", "number", "uuid"]


@dataclass(frozen=True)
class Needles:
    """A variant: the haystack, what keys and values look like, how many there are and how many are asked for."""

    haystack: Literal["noise", "essay", "needle"]
    key: Kind = "word"
    value: Kind = "number"
    keys: int = 1
    values: int = 1  # of each key
    queries: int = 1  # keys asked for


def draw(needles: Needles, prose: Prose | None, case: Case) -> Sample:
    """A sample; its size counts sentences of `prose`, else lines. Keys and values are all different."""
    rng, taken = case.random("needles"), set[str]()
    keys = [_new(needles.key, rng, taken) for _ in range(needles.keys)]
    values = [[_new(needles.value, rng, taken) for _ in range(needles.values)] for _ in keys]
    hidden = [_needle(needles, key, value) for key, own in zip(keys, values, strict=True) for value in own]
    rng.shuffle(hidden)
    asked = rng.sample(range(needles.keys), needles.queries)
    references = tuple(value for i in asked for value in values[i])
    template = ONE if len(references) == 1 else MANY
    hay = prose.take if prose else _lines(needles, case.random("lines"), taken)

    def prompt(size: int) -> str:
        rng = case.random("places")
        if prose:
            places = [size * depth // 100 for depth in sorted(rng.sample(_DEPTHS, len(hidden)))]
        else:
            places = sorted(rng.sample(range(size), len(hidden)))
        context = (" " if prose else "\n").join(spread(hay(size), places, hidden))
        return template.format(kind=needles.value, context=context, query=_listed([keys[i] for i in asked]))

    return Sample(prompt, references, least=len(hidden), most=case.length)


def _lines(needles: Needles, rng: Random, taken: set[str]) -> Callable[[int], list[str]]:
    """size -> the first lines of a haystack of noise or of needles with other keys and values."""
    if needles.haystack == "noise":
        return lambda size: [NOISE] * size
    lines: list[str] = []

    def take(size: int) -> list[str]:
        while len(lines) < size:
            lines.append(_needle(needles, _new(needles.key, rng, taken), _new(needles.value, rng, taken)))
        return lines[:size]

    return take


def _needle(needles: Needles, key: str, value: str) -> str:
    return NEEDLE.format(kind=needles.value, key=key, value=value)


def _new(kind: Kind, rng: Random, taken: set[str]) -> str:
    """One that is not taken yet, and takes it."""
    while (found := _any(kind, rng)) in taken:
        pass
    taken.add(found)
    return found


def _any(kind: Kind, rng: Random) -> str:
    if kind == "word":
        return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
    if kind == "number":
        return str(rng.randint(1_000_000, 9_999_999))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"
