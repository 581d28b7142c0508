"""Variable tracking: which variables hold the value, over a chain of four assignments, after one worked example.

The wording is RULER's ("assgined" too, which RULER's code has corrected since and lm-evaluation-harness has not). As in
the latter the prompt ends without the blank that RULER leaves there: it would take the blank from the answer's first
token.
"""

import string
from random import Random

from megatron_refine.eval.ruler.haystack import NOISE
from megatron_refine.eval.ruler.sample import Case, Sample, spread

TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {query} in the text above. "
    "Answer: According to the chain(s) of variable assignment in the text above, {number} variables are assgined the "
    "value {query}, they are:"
)
HOPS = 4
_EXAMPLE_LINES = 10  # of noise: what fills RULER's 500 tokens of an example, in its steps of five


def draw(case: Case) -> Sample:
    """A sample; its size counts lines of noise. The example has variables of three letters, and another value."""
    rng = case.random("chains")
    value, example_value = map(str, rng.sample(range(10_000, 100_000), 2))
    names, example_names = _names(rng, 5), _names(rng, 3)
    example = _question(example_names, example_value, _EXAMPLE_LINES, case.random("example's places"))
    example = f"{example} {' '.join(example_names)}"

    def prompt(size: int) -> str:
        return f"{example}\n\n{_question(names, value, size, case.random('places'))}"

    return Sample(prompt, tuple(names), least=len(names), most=case.length)


def _names(rng: Random, letters: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) <= HOPS:
        found["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    return list(found)


def _question(names: list[str], value: str, size: int, rng: Random) -> str:
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {name} = VAR {before} " for before, name in zip(names, names[1:], strict=False)]
    lines = spread([NOISE] * size, sorted(rng.sample(range(size), len(chain))), chain)
    return TEMPLATE.format(context="\n".join(lines), query=value, number=len(names))
