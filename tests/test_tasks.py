"""The registry of tasks, their files, scripted answerers on every task, and the paper's own files where they are."""

import json
import os
from pathlib import Path

import pytest

from megatron_refine.config import ConfigError
from megatron_refine.eval import files
from megatron_refine.eval.metrics import whole
from megatron_refine.eval.tasks import GROUPS, TASKS, Task, expand, of

ROUGE_ONE = 2 / (2 + 1e-8)  # the rouge library's score of two equal texts
DATA = Path(os.environ.get("REFINE_DATA", Path(__file__).parents[2] / "shared/data"))


def test_groups():
    assert [(name, len(members)) for name, members in GROUPS.items()] == [
        ("niah", 8),
        ("ruler", 13),
        ("ruler_qa", 2),
        ("longbench", 14),
        ("longbench12", 12),
    ]
    assert set(GROUPS["longbench"]) - set(GROUPS["longbench12"]) == {"musique", "gov_report"}
    assert all(TASKS[name].name == name for name in TASKS) and len(TASKS) == 13 + 2 + 14 + 2
    assert not GROUPS.keys() & TASKS.keys()


def test_names_become_tasks():
    assert [task.name for task in expand(["vt", "ruler_qa", "vt", "ruler_hotpotqa"], "eval.tasks")] == [
        "vt",
        "ruler_squadqa",
        "ruler_hotpotqa",
    ]
    assert {task.name for task in expand(["ruler", "niah"], "eval.tasks")} == set(GROUPS["ruler"])
    assert expand([], "eval.tasks") == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nhia", "eval.tasks=nhia: no such task; did you mean niah?"),
        ("niah_single1", "eval.tasks=niah_single1: no such task; did you mean niah_single_1?"),
        ("Trec", "eval.tasks=Trec: no such task; did you mean trec?"),
        ("", "eval.tasks=: no such task; groups are niah, ruler, ruler_qa, longbench, longbench12, tasks niah_single"),
    ],
)
def test_unknown_names(name, expected):
    with pytest.raises(ConfigError) as caught:
        expand(["vt", name], "eval.tasks")
    assert str(caught.value).startswith(expected)


# Scripted answers. Each task: references, a partial answer with its score by hand, and an answer that only the right
# reading scores; the text after the first line costs nothing where one line is read.
NUMBERS = ("1234567", "7654321", "1111111", "2222222")
MATCH_ALL = (NUMBERS, "1234567 and 2222222", 0.5)
MATCH_PART = (("11th century", "the 11th century"), "12th century", 0.0)
F1 = (("Paris is big", "Rome"), "The Paris", 2 * 1 * (1 / 3) / (4 / 3))
ROUGE = (("the cat sat on the mat",), "the cat sat", 2 * 0.6 / (1.6 + 1e-8))
CODE = (("    foo(a)",), "    foo(b)\n    bar(b)", 0.9)
CASES = (
    dict.fromkeys((*GROUPS["niah"], "vt", "cwe", "fwe"), MATCH_ALL)
    | dict.fromkeys(("qa_squad", "qa_hotpot", *GROUPS["ruler_qa"]), MATCH_PART)
    | dict.fromkeys(("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"), F1)
    | dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), ROUGE)
    | dict.fromkeys(("lcc", "repobench-p"), CODE)
    | {"trec": (("City",), "Type: City or State", 0.5)}
    | {"passage_count": (("12",), "12 of 13", 0.5)}
    | {"passage_retrieval_en": (("Paragraph 12",), "Paragraph 12, Paragraph 13", 0.5)}
)
AFTER_THE_LINE = {  # what a perfect answer scores when another line, "\nState 13 Rome", follows it
    **dict.fromkeys(("gov_report", "qmsum", "multi_news"), 2 * (5 / 8) / (5 / 8 + 1 + 1e-8)),
    **dict.fromkeys(("passage_count", "passage_retrieval_en"), 0.5),
}
AFTER_A_BREAK = dict.fromkeys(  # what it scores when the answer begins with a line end
    (*GROUPS["ruler_qa"], "narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique"), 0.0
)


@pytest.mark.parametrize("name", TASKS)
def test_scripted_answers(name):
    references, partial, expected = CASES[name]
    perfect = " ".join(references) if CASES[name] is MATCH_ALL else references[0]
    one = ROUGE_ONE if CASES[name] is ROUGE else 1.0
    assert of(name).score(perfect, references) == pytest.approx(one, abs=1e-12)
    assert of(name).score(partial, references) == pytest.approx(expected, abs=1e-12)
    assert of(name).score("", references) == of(name).score("\t", references) == 0.0
    assert of(name).score("\n\n", references) == 0.0
    after = AFTER_THE_LINE.get(name, one)
    assert of(name).score(f"{perfect}\nState 13 Rome", references) == pytest.approx(after, abs=1e-12)
    assert of(name).score(f"\n{perfect}", references) == pytest.approx(AFTER_A_BREAK.get(name, one), abs=1e-12)
    assert 1 <= TASKS[name].max_new_tokens <= 512


@pytest.mark.parametrize("name", TASKS)
def test_stop_strings_change_no_score(name):
    references, partial, _ = CASES[name]
    for answer in (references[0], partial):
        for text in (answer, f"{answer}\nState 13 Rome", f"\n{answer}", f"\n\n{answer}\n", f" \n{answer}"):
            ends = [text.index(stop) for stop in TASKS[name].stops if stop in text]
            assert of(name).score(text[: min(ends, default=None)], references) == of(name).score(text, references)


def test_only_tasks_of_one_line_have_a_stop_string():
    assert {name for name, task in TASKS.items() if task.stops == ("\n",)} == AFTER_A_BREAK.keys()
    assert {task.stops for task in TASKS.values()} == {(), ("\n",)}


# Files
ROW = {"prompt": "p", "answers": ["a"]}


def write(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def find(name: str, folder: Path, length: int | None = None) -> Path:
    return files.find(TASKS[name], str(folder), "eval.data", length)


def failure(name: str, folder: Path, length: int | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        files.read(TASKS[name], str(folder), "eval.data", length)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_by_name(tmp_path):
    names = ["a/qasper_16384", "a/qasper_e_16384", "b/hotpotqa", "ruler_squadqa_lact_4096_200_test", "repobench-p_8192"]
    names += ["ruler_squadqa_lact_4096_1600_train", "ruler_squadqa_lact_8192_200_test", "ruler_hotpotqa_16384"]
    paths = {name: write(tmp_path / f"{name}.jsonl", ROW) for name in names}
    (tmp_path / "squad.json").write_text("{}", encoding="utf-8")
    assert find("qasper", tmp_path) == paths["a/qasper_16384"] == find("qasper", tmp_path, 16384)
    assert (
        find("hotpotqa", tmp_path) == paths["b/hotpotqa"] and find("repobench-p", tmp_path) == paths["repobench-p_8192"]
    )
    assert find("ruler_squadqa", tmp_path, 4096) == paths["ruler_squadqa_lact_4096_200_test"]
    assert find("ruler_squadqa", tmp_path, 8192) == paths["ruler_squadqa_lact_8192_200_test"]
    assert find("ruler_hotpotqa", tmp_path, 16384) == paths["ruler_hotpotqa_16384"]
    assert find("qasper", tmp_path / "a/qasper_16384.jsonl") == paths["a/qasper_16384"]


def test_files_by_what_they_hold(tmp_path):
    first = write(tmp_path / "x.jsonl", ROW | {"task": "trec"})
    write(tmp_path / "y.jsonl", {"text": "a document"})
    write(tmp_path / "z.jsonl", ROW | {"task": "ruler_squadqa", "max_seq_length": 4096})
    last = write(tmp_path / "zz.jsonl", ROW | {"task": "ruler_squadqa", "max_seq_length": 8192})
    assert find("trec", tmp_path) == first and find("ruler_squadqa", tmp_path, 8192) == last


def test_files_that_are_missing_or_many(tmp_path):
    write(tmp_path / "ruler_squadqa_lact_4096_200_test.jsonl", ROW)
    message = failure("ruler_squadqa", tmp_path, 16384)
    assert message.startswith(f"eval.data: {tmp_path}: no file of ruler_squadqa at length 16384 among 1 .jsonl and ")
    assert message.endswith("it is known by its name (ruler_squadqa_4096_200_test.parquet) or its column task")
    assert "no file of trec among 1 " in failure("trec", tmp_path)
    write(tmp_path / "b/ruler_squadqa_delta_net_4096_200_test.jsonl", ROW)
    message = failure("ruler_squadqa", tmp_path, 4096)
    assert message.startswith(
        f"eval.data: {tmp_path}: 2 files of ruler_squadqa at length 4096: {tmp_path}/b/ruler_squadqa"
    )
    assert message.endswith("lact_4096_200_test.jsonl; name a folder with one of them")
    assert files.read(TASKS["ruler_squadqa"], str(tmp_path / "b"), "eval.data", 4096)[0].max_new_tokens == 32
    assert "gone: no such file or folder" in failure("trec", tmp_path / "gone")


def test_a_row_of_another_task(tmp_path):
    path = write(tmp_path / "trec_16384.jsonl", ROW | {"task": "trec"}, ROW | {"task": "lcc"})
    assert failure("trec", tmp_path) == f"eval.data: {path}: row 2 belongs to lcc, not to trec; rename the file"


# The files of the paper
ROWS = {  # in each file, and the tokens that may be written
    **{"narrativeqa": (61, 128), "qasper": (191, 128), "multifieldqa_en": (143, 64), "hotpotqa": (96, 32)},
    **{"2wikimqa": (185, 32), "musique": (17, 32), "gov_report": (16, 512), "qmsum": (109, 512)},
    **{"multi_news": (193, 512), "samsum": (155, 128), "trec": (200, 64), "triviaqa": (127, 32), "lcc": (488, 64)},
    **{"repobench-p": (320, 64), "ruler_squadqa": (200, 32), "ruler_hotpotqa": (200, 32)},
}
IMPERFECT = {  # rows whose own reference does not score 1, each for the reason below; of the files that were looked at
    **dict.fromkeys(("trec", "gov_report", "ruler_squadqa", "ruler_hotpotqa"), []),
    "qasper": [83, 108, 134],
    "samsum": [4, 13, 28, 29, 48, 63, 82, 83, 97, 109, 112, 113, 124, 134, 140, 153],
    "lcc": [114, 163, 208, 438],
}


def unscorable(task: Task, references: tuple[str, ...]) -> bool:
    """Why a perfect answer scores less than 1, by the benchmark's rules."""
    if task.name in ("lcc", "repobench-p"):  # the line looks like a comment: it has "`", "#" or "//"
        return all(any(mark in text for mark in ("`", "#", "//")) for text in references)
    if task.name == "samsum":  # a blank at the end is a sentence that no answer can match
        return all(text.endswith(" ") for text in references)
    return task.reading is not whole and all("\n" in text for text in references)  # only its first line counts


PATHS = sorted(path for name in ROWS for path in DATA.rglob(f"{name}_*.parquet") if not path.stem.endswith("_train"))
ABSENT = pytest.mark.skip(reason=f"no evaluation files of the paper in {DATA}: set REFINE_DATA to a folder with them")


@pytest.mark.parametrize("path", PATHS or [pytest.param(DATA, marks=ABSENT)], ids=lambda path: path.stem)
def test_files_of_the_paper(path):
    name = next(name for name in ROWS if path.stem.startswith(f"{name}_"))
    task = TASKS[name]
    examples = files.read(task, str(path), "eval.data")
    assert (len(examples), {example.max_new_tokens for example in examples}) == (ROWS[name][0], {ROWS[name][1]})
    assert [example.index for example in examples] == list(range(len(examples)))
    assert {task.score("", example.references) for example in examples} == {0.0}
    best = [max(task.score(text, e.references) for text in e.references) for e in examples]
    if name in IMPERFECT:
        imperfect = [i for i, value in enumerate(best) if value < ROUGE_ONE - 1e-12]
        assert imperfect == [i for i, e in enumerate(examples) if unscorable(task, e.references)] == IMPERFECT[name]
    if name == "lcc":
        assert sum("|" in text for e in examples for text in e.references) == 7  # which nothing cuts at it
    if not task.sized:
        assert find(name, DATA) == path
