"""Scores in [0, 1] of a written answer, given the answers that count as right, as the benchmarks define them.

Every score is a function (prediction, references) -> float; references hold one text or more. What of a prediction is
read (all of it, its first line) belongs to the task: see the readings below and tasks.py.

Sources: RULER's evaluation (arXiv 2404.06654); LongBench's metrics.py (arXiv 2308.14508); for what the REFINE paper
reports, the official code's reward_score/ruler.py and longbench.py.
"""

import functools
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import SequenceMatcher
from typing import Any

from megatron_refine.config import ConfigError

Score = Callable[[str, Sequence[str]], float]
Reading = Callable[[str], str]

_CONTROL = re.compile(r"[\x00-\x1f]")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_COMMENTS = ("`", "#", "//")

# The classes of TREC as LongBench writes them (one is cut short there). Its files list them in a column `all_classes`;
# those of the REFINE paper do not, but the examples in every prompt use exactly these names.
TREC_CLASSES = (
    "Food; Date; Order, rank; Speed; Disease and medicine; Word with a special property; Abbreviation; Language; "
    "Letter like a-z; Other entity; Animal; Expression abbreviated; Price; Techniques and method; Musical instrument; "
    "Mountain; Currency name; Event; Product; State; Individual; Organ of body; Reason; Manner of an action; City; "
    "Religion; Invention, book and other creative piece; Distance, linear measure; Temperature; Postcode or other "
    "code; Size, area and volume; Sport; Country; Other location; Lasting time of somethin; Equivalent term; "
    "Description of something; Weight; Vehicle; Color; Other number; Definition of something; Element and substance; "
    "Description of a person; Symbols and sign; Number of something; Plant; Percent, fraction; Group or organization "
    "of person; Title of a person"
).split("; ")


def whole(prediction: str) -> str:
    return prediction


def first_line(prediction: str) -> str:
    r"""Up to the first "\n", which a prediction may begin with: then nothing is left."""
    return prediction.split("\n", 1)[0]


def first_written_line(prediction: str) -> str:
    r"""The first line after any "\n" at the beginning."""
    return first_line(prediction.lstrip("\n"))


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """Share of the references that the prediction contains, whatever their case (RULER: niah, vt, cwe, fwe)."""
    return sum(_contained(prediction, references)) / len(references)


def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """1 where the prediction contains any reference, whatever its case (RULER: qa; REFINE: on the first line)."""
    return float(any(_contained(prediction, references)))


def _contained(prediction: str, references: Sequence[str]) -> list[bool]:
    text = _CONTROL.sub("\n", prediction.strip()).strip().lower()
    return [reference.lower() in text for reference in references]


def qa_f1(prediction: str, references: Sequence[str]) -> float:
    """F1 of words, the best over the references, without case, punctuation and articles (SQuAD's normalisation)."""
    return max(_f1(_words(prediction), _words(reference)) for reference in references)


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _f1(written: list[str], wanted: list[str]) -> float:
    shared = (Counter(written) & Counter(wanted)).total()
    if not shared:
        return 0.0
    precision, recall = shared / len(written), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L F of the `rouge` library, the best over the references; 0 for nothing but whitespace or full stops.

    The library splits texts into sentences at full stops, counts every word once and adds 1e-8 to a denominator: a
    perfect answer scores 0.999999995. References are taken as they are: one that ends with a blank has an empty last
    sentence, which no prediction without its surrounding blanks can match (some rows of samsum).
    """
    text = prediction.strip()
    return max(_rouge_l(text, reference) for reference in references)


def _rouge_l(text: str, reference: str) -> float:
    if not text.strip(".") or not reference.strip("."):
        return 0.0  # no sentence: the library raises
    with _deep_calls(len(text.split()) + len(reference.split())):  # its search calls itself once a word
        return _library().get_scores(text, reference)[0]["rouge-l"]["f"]


@functools.cache
def _library() -> Any:
    from rouge import Rouge

    return Rouge(metrics=["rouge-l"], stats=["f"])


@contextmanager
def _deep_calls(number: int) -> Iterator[None]:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + number)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


def classification(prediction: str, references: Sequence[str]) -> float:
    """1 / number of TREC classes that the prediction names, if the right one is among them, else 0; best reference.

    LongBench first drops named classes that are part of the right one's name; among these fifty there are none.
    """
    named = [name for name in TREC_CLASSES if name in prediction]
    return max(1 / len(named) if reference in named else 0.0 for reference in references)


def code_similarity(prediction: str, references: Sequence[str]) -> float:
    r"""Likeness of the first line without a comment to the reference, in hundredths; best reference.

    A line with "`", "#" or "//" counts as a comment, "\n" at the beginning do not count. Where all lines are comments
    the score is 0, as in LongBench; the official REFINE code then compares the whole prediction.

    The likeness is what fuzz.ratio of fuzzywuzzy 0.18.0 gives on Python's own difflib. With python-Levenshtein beside
    it that library gives other numbers, and a score must not depend on what else is installed.
    """
    lines = prediction.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in _COMMENTS)), "")
    return max(_likeness(code, reference) for reference in references)


def _likeness(written: str, wanted: str) -> float:
    if written == wanted:
        return 1.0  # difflib leaves frequent characters of long lines out, even of equal ones
    return round(100 * SequenceMatcher(None, written, wanted).ratio()) / 100


def count(prediction: str, references: Sequence[str]) -> float:
    """Share of the numbers in the prediction that are the right one; best reference (LongBench: passage_count)."""
    numbers = re.findall(r"\d+", prediction)
    return max(numbers.count(reference) / max(len(numbers), 1) for reference in references)


def retrieval(prediction: str, references: Sequence[str]) -> float:
    """Share of the numbers in the prediction that are the paragraph's (LongBench: passage_retrieval_en).

    Raises ConfigError for a reference that does not name a "Paragraph N".
    """
    return count(prediction, [_paragraph(reference) for reference in references])


def _paragraph(reference: str) -> str:
    found = re.search(r"Paragraph (\d+)", reference)
    if not found:
        raise ConfigError(
            f'the answer {reference!r:.60} names no "Paragraph N"; correct the file or choose another task'
        )
    return found[1]
