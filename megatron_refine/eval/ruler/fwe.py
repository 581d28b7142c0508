"""Frequent words: the three made-up words that stand in a text most often, whose counts follow a zeta distribution.

The wording and the numbers are RULER's: length / 50 words of six letters, the word of rank k has a share of
k^-2 / zeta(2), the first rank is noise, "...".
"""

import math
import string
from random import Random

from megatron_refine.eval.ruler.sample import Case, Sample

TEMPLATE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text? "
    "Answer: According to the coded text above, the three most frequently appeared words are:"
)
_ZETA_OF_2 = math.pi**2 / 6
_LEAST = 74  # words: from here on the fourth rank stands more often than the fifth


def draw(case: Case) -> Sample:
    """A sample; its size counts words, of which those too rare for one occurrence are left out."""
    ranked = ["...", *_made_up(case.random("words"), max(case.length // 50, 5) - 1)]

    def prompt(size: int) -> str:
        counts = (int(size * k**-2 / _ZETA_OF_2) for k in range(1, len(ranked) + 1))
        text = [word for word, times in zip(ranked, counts, strict=True) for _ in range(times)]
        case.random("order").shuffle(text)
        return TEMPLATE.format(context=" ".join(text))

    return Sample(prompt, tuple(ranked[1:4]), least=_LEAST, most=max(2 * case.length, _LEAST))


def _made_up(rng: Random, number: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < number:
        found["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    return list(found)
