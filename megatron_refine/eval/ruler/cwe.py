"""Common words: the ten words of a numbered list that stand in it most often, after one worked example.

The wording and the counts are RULER's: a common word stands 30 times and any other 3 times, below 4096 tokens 6 times
and once; in the example 10 and 3 times, or 3 times and once.
"""

from collections.abc import Iterator
from itertools import islice
from random import Random

from megatron_refine.eval.ruler.sample import Case, Sample
from megatron_refine.eval.ruler.words import ADJECTIVES, NOUNS, VERBS

TEMPLATE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list? "
    "Answer: The top 10 words that appear most often in the list are:"
)
COMMON = 10


def draw(case: Case) -> Sample:
    """A sample; its size counts different words. Those of the example do not come again."""
    short = case.length < 4096
    source = _words(case.random("words"))
    shown = list(islice(source, 20 if short else 40))
    words = list(islice(source, COMMON))
    common = words[:COMMON]
    example = _question(shown, (3, 1) if short else (10, 3), case.random("example's order"))
    example = f"{example} {_numbered(shown[:COMMON])}"

    def prompt(size: int) -> str:
        words.extend(islice(source, max(size - len(words), 0)))
        return f"{example}\n{_question(words[:size], (6, 1) if short else (30, 3), case.random('order'))}"

    return Sample(prompt, tuple(common), least=COMMON + 1, most=case.length)


def _words(rng: Random) -> Iterator[str]:
    """Different words in random order; when all have come, adjectives and nouns in pairs."""
    words = ADJECTIVES + NOUNS + VERBS
    yield from rng.sample(words, len(words))
    for number in rng.sample(range(len(ADJECTIVES) * len(NOUNS)), 1 << 17):
        yield f"{ADJECTIVES[number // len(NOUNS)]}-{NOUNS[number % len(NOUNS)]}"


def _question(words: list[str], times: tuple[int, int], rng: Random) -> str:
    listed = words[:COMMON] * times[0] + words[COMMON:] * times[1]
    rng.shuffle(listed)
    return TEMPLATE.format(context=_numbered(listed))


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))
