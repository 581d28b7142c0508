"""Scores by hand: every metric, what of an answer is read, and what libraries and odd texts do to them."""

import difflib
import random
import sys
import warnings

import pytest

from megatron_refine.config import ConfigError
from megatron_refine.eval import metrics
from megatron_refine.eval.metrics import TREC_CLASSES, first_line, first_written_line

ROUGE_ONE = 2 / (2 + 1e-8)  # what the library gives two equal texts


@pytest.mark.parametrize(
    ("text", "first", "written"),
    [
        ("", "", ""),
        ("a", "a", "a"),
        (" a \nb", " a ", " a "),
        ("\n\na\nb", "", "a"),
        (" \na", " ", " "),
        ("\r\na", "\r", "\r"),
        ("a\u2028b\x0bc\n", "a\u2028b\x0bc", "a\u2028b\x0bc"),
    ],
)
def test_what_is_read(text, first, written):
    assert (first_line(text), first_written_line(text), metrics.whole(text)) == (first, written, text)


@pytest.mark.parametrize(
    ("prediction", "every", "part"),
    [
        ("", 0.0, 0.0),
        ("Alpha, beta and GAMMA DELTA.", 1.0, 1.0),
        ("it is alphabet", 1 / 3, 1.0),
        ("\n\n beta\x00alpha", 2 / 3, 1.0),
        ("gamma  delta", 0.0, 0.0),
        ("al pha", 0.0, 0.0),
    ],
)
def test_string_match(prediction, every, part):
    references = ("alpha", "Beta", "gamma delta")
    assert metrics.string_match_all(prediction, references) == every
    assert metrics.string_match_part(prediction, references) == part


def test_control_characters_become_line_ends():
    assert metrics.string_match_all("a\x01b", ["a\nb"]) == 1.0
    assert metrics.string_match_all("\x1fa\x1f", ["\na"]) == 0.0


def test_the_best_of_the_references_counts_for_questions():
    """lm-evaluation-harness takes their mean, and so loses two thirds of a right answer."""
    assert metrics.string_match_part("early 11th century", ["11th century", "12th", "the early 11th century"]) == 1.0


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("The cat, sat!", ["a CAT sat"], 1.0),
        ("the cat sat down", ["cat sat"], 2 * (2 / 3) * 1 / (2 / 3 + 1)),
        ("cat cat", ["cat dog"], 0.5),
        ("dog", ["cat", "hot dog"], 2 * 1 * 0.5 / 1.5),
        ("anthem", ["an them"], 0.0),
        ("", ["cat"], 0.0),
        ("the", ["the"], 0.0),
        ("dont", ["don't"], 1.0),
        ("U.S.A.", ["USA"], 1.0),  # marks go first: its A is no article
    ],
)
def test_qa_f1(prediction, references, expected):
    assert metrics.qa_f1(prediction, references) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("One day. It rains.", ["One day. It rains."], ROUGE_ONE),
        ("the cat sat", ["the cat sat on the mat"], 2 * 0.6 / (1.6 + 1e-8)),  # five different words
        ("  the cat sat \n", ["dog", "the cat sat on the mat"], 2 * 0.6 / (1.6 + 1e-8)),
        ("sat cat", ["cat sat"], 2 * 0.25 / (1 + 1e-8)),
        ("One day.", ["One day. "], 2 * (2 / 3) / (5 / 3 + 1e-8)),  # the blank is a last sentence
        ("dog", ["cat"], 0.0),
        ("", ["cat"], 0.0),
        (" \n\t", ["cat. "], 0.0),
        ("...", ["cat"], 0.0),
        ("cat", ["."], 0.0),
    ],
)
def test_rouge_l(prediction, references, expected):
    assert metrics.rouge_l(prediction, references) == pytest.approx(expected, abs=1e-12)


def test_rouge_l_of_a_sentence_longer_than_the_stack():
    limit = sys.getrecursionlimit()
    words = [f"w{i}" for i in range(limit + 500)]
    assert metrics.rouge_l(" ".join(words), ["w0 w1 no"]) == pytest.approx(
        2 * (2 / 3) * (2 / len(words)) / (2 / 3 + 2 / len(words) + 1e-8), abs=1e-12
    )
    assert sys.getrecursionlimit() == limit


def test_classification():
    assert len(TREC_CLASSES) == len(set(TREC_CLASSES)) == 50
    assert not [(a, b) for a in TREC_CLASSES for b in TREC_CLASSES if a != b and a in b]
    assert all(metrics.classification(name, [name]) == 1.0 for name in TREC_CLASSES)
    assert metrics.classification("Type: City\nState or Country", ["State"]) == 1 / 3
    assert metrics.classification("city", ["City"]) == metrics.classification("", ["City"]) == 0.0
    assert metrics.classification("City", ["State", "City"]) == 1.0


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("    foo(a)\n    bar(b)", "    foo(a)", 1.0),
        ("\n\nfoo(a)", "foo(a)", 1.0),
        ("# a comment\n// another\n`x`\nfoo(b)", "foo(a)", 0.83),  # 2 * 5 of 12 characters
        ("foo(a)", " foo(a)", 0.92),  # 12 of 13
        ("# only\n# comments", "# only", 0.0),
        ("url = 'http://x'", "url = 'http://x'", 0.0),  # the benchmark's rule, not ours
        ("# one\n\nfoo(a)", "foo(a)", 0.0),  # the empty line is the first without a comment
        ("", "foo(a)", 0.0),
    ],
)
def test_code_similarity(prediction, reference, expected):
    assert metrics.code_similarity(prediction, ["zzz", reference]) == expected


def test_likeness_is_that_of_fuzzywuzzy_without_levenshtein(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks for python-Levenshtein, which would give other numbers
        fuzz = pytest.importorskip("fuzzywuzzy.fuzz", reason="needs fuzzywuzzy: pip install megatron-refine[dev]")
    monkeypatch.setattr(fuzz, "SequenceMatcher", difflib.SequenceMatcher)
    rng = random.Random(0)
    texts = ["", " ", "é😀"] + ["".join(rng.choices("ab (){}=", k=rng.randrange(1, 300))) for _ in range(40)]
    for written in texts:
        for wanted in texts:
            if written or wanted:
                assert metrics.code_similarity(written, [wanted]) == fuzz.ratio(written, wanted) / 100


def test_numbers():
    assert metrics.count("There are 12 of 12, not 3.", ["12"]) == 2 / 3
    assert metrics.count("none", ["12"]) == metrics.count("", ["1"]) == 0.0
    assert metrics.retrieval("Paragraph 7", ["Paragraph 7"]) == 1.0
    assert metrics.retrieval("7 or 8", ["Paragraph 8"]) == 0.5
    with pytest.raises(ConfigError, match="the answer 'seven' names no \"Paragraph N\"; correct the file"):
        metrics.retrieval("7", ["seven"])


def test_words_count_as_often_as_they_stand():
    """F1 of multisets, as SQuAD's: a word that is said twice must be wanted twice."""
    assert metrics.qa_f1("no no", ["no no"]) == 1.0
    assert metrics.qa_f1("no no", ["no"]) == metrics.qa_f1("no", ["no no"]) == pytest.approx(2 / 3)
    assert metrics.qa_f1("no yes no", ["no no maybe no"]) == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
