"""Samples of RULER's thirteen tasks at any length, for any tokenizer."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from megatron_refine.config import ConfigError
from megatron_refine.data.examples import Example
from megatron_refine.eval.ruler import cwe, fwe, niah, qa, vt
from megatron_refine.eval.ruler.fit import largest_size
from megatron_refine.eval.ruler.haystack import read_prose
from megatron_refine.eval.ruler.niah import Needles
from megatron_refine.eval.ruler.sample import Case, Sample

NIAH = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", value="uuid"),
    "niah_multikey_1": Needles("essay", keys=4),
    "niah_multikey_2": Needles("needle"),
    "niah_multikey_3": Needles("needle", key="uuid", value="uuid"),
    "niah_multivalue": Needles("essay", values=4),
    "niah_multiquery": Needles("essay", keys=4, queries=4),
}
MAX_NEW_TOKENS = dict.fromkeys(NIAH, 128) | {"vt": 30, "cwe": 120, "fwe": 50} | dict.fromkeys(qa.FILES, 32)


def generate(
    task: str,
    length: int,
    indices: Sequence[int],
    seed: int,
    count_tokens: Callable[[str], int],
    *,
    essays: str = "",
    data: str = "",
) -> Iterator[Example]:
    """The samples `indices` of a task, whose prompt and answer take `length` tokens or as little less as can be.

    A sample depends on seed, task, length and its index (and on the tokenizer and the texts) alone: every part of an
    evaluation, in any order, gives the same ones, and another length gives others.

    count_tokens(prompt): its tokens, BOS included where prompts begin with one. essays: a file or folder with prose to
    hide needles in, see `read_prose`. data: a folder with squad.json and hotpotqa.json.

    Raises ConfigError for an unknown task, for missing texts, and for a length that is too short, with the least.
    """
    draw = _drawer(task, essays, data)
    budget = length - MAX_NEW_TOKENS[task]

    def largest(sample: Sample, guess: int) -> int | None:
        return largest_size(lambda n: count_tokens(sample.prompt(n)), budget, sample.least, sample.most, guess)

    first = draw(Case(task, length, 0, seed))  # whichever are asked for: the search must not depend on that
    guess = largest(first, 2 * first.least + 8) or first.least
    for index in indices:
        sample = draw(Case(task, length, index, seed))
        size = largest(sample, guess)
        if size is None:
            samples = (draw(Case(task, length, i, seed)) for i in indices)
            least = max(count_tokens(each.prompt(each.least)) for each in samples) + MAX_NEW_TOKENS[task]
            enough = (least // 64 + 2) * 64  # at another length there are other keys, a few tokens longer perhaps
            raise ConfigError(
                f"{task} at length {length}: the smallest haystack, the question and the answer take up to {least} "
                f"tokens; evaluate at {enough} or more"
            )
        yield Example(task, index, sample.prompt(size), sample.references, MAX_NEW_TOKENS[task])


def haystack_of(task: str, essays: str = "") -> str:
    """Which prose the samples of a task are made of, for the record of a result; "" for tasks without prose."""
    return read_prose(essays).description if task in NIAH and NIAH[task].haystack == "essay" else ""


def _drawer(task: str, essays: str, data: str) -> Callable[[Case], Sample]:
    """What draws samples of the task; the texts it needs are read here."""
    if task in NIAH:
        needles = NIAH[task]
        return partial(niah.draw, needles, read_prose(essays) if needles.haystack == "essay" else None)
    if task in qa.FILES:
        return partial(qa.draw, qa.read_pool(task, data))
    drawers = {"vt": vt.draw, "cwe": cwe.draw, "fwe": fwe.draw}
    if task not in drawers:
        raise ConfigError(f"{task}: no task of RULER; these are {', '.join(MAX_NEW_TOKENS)}")
    return drawers[task]
