"""What every task of RULER shares: which sample is asked for, and the sample before its haystack has a size."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """All that a sample depends on, beside the text it is made of."""

    task: str
    length: int  # tokens of prompt and answer
    index: int
    seed: int

    def random(self, purpose: str) -> random.Random:
        """A generator of its own for each purpose, the same at every call: no draw depends on how many came before."""
        return random.Random(f"{self.seed}/{self.task}/{self.length}/{self.index}/{purpose}")


@dataclass(frozen=True)
class Sample:
    """A sample whose haystack can have any size: all but the size is drawn, a larger haystack holds a smaller one."""

    prompt: Callable[[int], str]  # size -> the prompt
    references: tuple[str, ...]
    least: int  # the smallest haystack that makes sense, in the task's own units
    most: int  # the largest there is


def spread(lines: Sequence[str], places: Sequence[int], needles: Sequence[str]) -> list[str]:
    """`lines` with each needle before the line at its place; places in ascending order."""
    found = list(lines)
    for before, (place, needle) in enumerate(zip(places, needles, strict=True)):
        found.insert(place + before, needle)
    return found
