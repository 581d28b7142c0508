"""megatron-refine ruler-qa: the paper's files for a tokenizer of one's own, and that the product reads them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from megatron_refine.cli.ruler_qa import main
from megatron_refine.config import ConfigError, load
from megatron_refine.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_refine.eval import files
from megatron_refine.eval.ruler import qa
from megatron_refine.eval.ruler.haystack import read_prose
from megatron_refine.eval.ruler.qa_files import Maker
from megatron_refine.eval.suite import Request, collect
from megatron_refine.eval.tasks import TASKS
from megatron_refine.models.delta_net.config import DeltaNetConfig
from megatron_refine.models.family import FAMILIES
from tests import runs
from tests.conversions import write_random
from tests.test_evaluate import evaluate
from tests.test_ruler import data  # noqa: F401 - the fixture: squad.json of 48 questions, hotpotqa.json of 30
from tests.test_tasks import DATA, ROW, failure, write
from tests.zygote import Zygote

LENGTHS = (1200, 2400)  # of the small vocabulary: ten documents of the fixture have up to 1,100
TRAIN, TEST = 12, 5


def random_model(path: Path) -> Path:
    """Random weights, and a tokenizer of 512 ids."""
    settings: Any = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 128}
    write_random(path, DeltaNetConfig(family="delta_net", vocab_size=512, **settings))
    texts = [
        f"Paragraph {i} of article {i} says that its number is {i}. Sentence Title Person again" for i in range(50)
    ]
    train_tokenizer([*read_prose("").sentences[:300], *texts], 512, path / "tokenizer.json")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> Path:
    return random_model(tmp_path_factory.mktemp("model") / "hf")


def line(questions: str, model: Path, out: Path, *more: str) -> list[str]:
    return [
        "--data", questions, "--tokenizer", str(model), "--lengths", ",".join(map(str, LENGTHS)), "--out", str(out),
        "--name", "delta_net", "--train", str(TRAIN), "--test", str(TEST), *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def made(data: str, model: Path, tmp_path_factory: Any) -> Path:  # noqa: F811
    out: Path = tmp_path_factory.mktemp("made")
    assert main(line(data, model, out)) == 0
    return out


def rows(folder: Path, task: str, length: int, side: str) -> list[dict[str, Any]]:
    count = {"train": TRAIN, "test": TEST}[side]
    return pq.read_table(folder / f"{task}_delta_net_{length}_{count}_{side}.parquet").to_pylist()


def question(row: dict[str, Any]) -> str:
    return row["prompt"].rsplit("\nQuestion: ", 1)[1].removesuffix("\nAnswer:")


def test_the_files_are_as_the_papers(made: Path, model: Path) -> None:
    """Names, columns, wording, and lengths in the tokenizer's own tokens."""
    assert len(list(made.iterdir())) == 8
    count: Callable[[str], int] = lambda text: len(load_tokenizer(model, 512, "").encode([text])[0])  # noqa: E731
    for task in ("ruler_squadqa", "ruler_hotpotqa"):
        for length in LENGTHS:
            for side, number in (("train", TRAIN), ("test", TEST)):
                found = rows(made, task, length, side)
                assert [row["index"] for row in found] == list(range(number))
                assert list(found[0]) == [
                    "index", "prompt", "answer", "prompt_length", "max_answer_length", "total_length",
                    "max_seq_length", "task",
                ]  # fmt: skip
                for row in found:
                    assert (row["task"], row["max_seq_length"]) == (task, length)
                    assert row["prompt_length"] == count(row["prompt"]) <= length - 33
                    assert row["max_answer_length"] == max(map(count, row["answer"])) <= 31
                    assert row["total_length"] == row["prompt_length"] + row["max_answer_length"] <= length
                    assert row["prompt"].count("\nDocument ") % 10 == 0
    tens = {row["prompt"].count("\nDocument ") for row in rows(made, "ruler_squadqa", 2400, "test")}
    assert max(tens) > 10, "the longer prompts hold more documents"


@pytest.mark.skipif(not DATA.exists(), reason=f"needs the REFINE paper's evaluation files in {DATA}")
def test_the_wording_is_that_of_the_papers_files(made: Path) -> None:
    path = next(DATA.rglob("ruler_squadqa_delta_net_4096_200_test.parquet"))
    official, own = pq.read_table(path), rows(made, "ruler_squadqa", 1200, "test")[0]
    theirs = official.to_pylist()[0]
    mine = pq.read_schema(made / f"ruler_squadqa_delta_net_1200_{TEST}_test.parquet")
    assert [(f.name, str(f.type).replace("element", "item")) for f in official.schema] == [
        (f.name, str(f.type).replace("element", "item")) for f in mine
    ]

    def frame(row: dict[str, Any]) -> list[str]:
        head, rest = row["prompt"].split("\nDocument 1:\n")
        return [head, rest.rsplit("\n\nAnswer the question", 1)[1].replace(question(row), "QUESTION")]

    assert (
        frame(own) == frame(theirs) and "\n\nDocument 2:\n" in own["prompt"] and "\n\nDocument 2:\n" in theirs["prompt"]
    )


def test_no_question_is_trained_on_and_tested(made: Path) -> None:
    for task in ("ruler_squadqa", "ruler_hotpotqa"):
        sides = [{question(row) for n in LENGTHS for row in rows(made, task, n, side)} for side in ("train", "test")]
        assert not sides[0] & sides[1] and (len(sides[0]), len(sides[1])) == (TRAIN, TEST)


def test_an_answer_and_its_end_are_thirty_two_tokens(model: Path) -> None:
    tokenizer = load_tokenizer(model / "tokenizer.json", 512, "")

    def answer(tokens: int) -> str:
        text = next(text for i in range(99) if len(tokenizer.encode([text := "q~" * i])[0]) >= tokens)
        text = text[: len(text) - (len(tokenizer.encode([text])[0]) > tokens)]
        assert len(tokenizer.encode([text])[0]) == tokens
        return text

    documents = tuple(f"Document {i}" for i in range(10))
    pool = qa.Pool([qa.Question(f"{n}?", (answer(n),), documents) for n in (31, 32)], list(documents))
    chosen = Maker(pool, "ruler_squadqa", 1200, 0, tokenizer)
    assert [chosen._sample(i).references for i in chosen._fitting(range(2), 2)] == [(answer(31),)]


def test_the_seed_decides(made: Path, data: str, model: Path, tmp_path: Path) -> None:  # noqa: F811
    for seed in (1, 2):
        assert main(line(data, model, tmp_path / str(seed), "--lengths", "1200", "--seed", str(seed))) == 0
    first = {path.name: path.read_bytes() for path in (tmp_path / "1").iterdir()}
    assert all((made / name).read_bytes() == content for name, content in first.items()) and len(first) == 4
    other = rows(tmp_path / "2", "ruler_squadqa", 1200, "test")
    assert other != rows(made, "ruler_squadqa", 1200, "test")


def test_what_is_there_is_kept(made: Path, data: str, model: Path, capsys: Any) -> None:  # noqa: F811
    before = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    assert main(line(data, model, made)) == 0
    assert capsys.readouterr().out == f"{made}: all 8 files are there, made with the same arguments; nothing to do\n"
    one = next(iter(before))
    content = one.read_bytes()
    one.unlink()
    assert main(line(data, model, made)) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and said[0].startswith(f"{one}: ") and said[1] == "the other 7 files were there"
    assert one.read_bytes() == content and all(p.stat().st_mtime_ns == t for p, t in before.items() if p != one)
    assert main(line(data, model, made, "--seed", "2")) == 2
    assert "holds other rows than these; name another folder, or delete it" in capsys.readouterr().err


BAD: list[tuple[list[str], str]] = [
    (["--data", "gone"], "gone/squad.json: no such file; it needs SQuAD 2.0's dev-v2.0.json as squad.json"),
    (["--tokenizer", "gone.json"], "--tokenizer: gone.json: no such file"),
    (["--lengths", ""], "--lengths: names no length"),
    (["--lengths", "200"], "--lengths: ruler_squadqa at length 200: ten documents, the question and the answer take "),
    (
        ["--train", "44"],
        "squad.json: has 48 questions, fewer than --train 44 and --test 5 together; ask for 48 at most",
    ),
    (["--train", "26"], "hotpotqa.json: has 30 questions, fewer than --train 26 and --test 5 together"),
    (["--test", "0"], "--test=0: must be 1 or more"),
    (["--name", "Delta-Net"], "--name=Delta-Net: name a family or a model in small letters, digits and _"),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=lambda value: " ".join(value)[:30])
def test_what_cannot_be_made(
    change: list[str], words: str, data: str, model: Path, tmp_path: Path, capsys: Any  # noqa: F811
) -> None:  # fmt: skip
    assert main(line(data, model, tmp_path / "out", *change)) == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.count("\n") == 1 and not said.out and not (tmp_path / "out").exists()


def test_training_and_evaluation_read_them(
    made: Path, model: Path, tmp_path: Path, ranks: Zygote, monkeypatch: Any
) -> None:  # fmt: skip
    """As they are: a step of post-training on one, and answers to another."""
    paths = {
        side: str(made / f"ruler_squadqa_delta_net_1200_{n}_{side}.parquet")
        for side, n in (("train", TRAIN), ("test", TEST))
    }
    config = runs.write_config(
        tmp_path, tmp_path / "cache",
        data={"paths": [], "valid_paths": [], "tokenizer": str(model / "tokenizer.json"), "seq_length": 1200},
        task={"paths": [paths["train"]], "valid_paths": [paths["test"]], "max_new_tokens": 4},
        train={"phase": "posttrain", "steps": 1}, eval={"sequences": 0, "every": 1, "examples": 2},
    )  # fmt: skip
    assert load(str(config), [], FAMILIES).task.paths == [paths["train"]]
    end = ranks(1, runs.command, arguments=["--config", str(config)])[0]
    assert end.code == 0 and "step 1/1" in end.out, end.err
    command = [str(model), "--tasks", "ruler_qa", "--lengths", "1200", "--data", str(made), "--examples", "2"]
    end = ranks(1, evaluate, arguments=[*command, "--out", str(tmp_path / "out")])[0]
    assert end.code == 0 and "| model | ruler_squadqa 1200 |" in end.out, end.err


FOLDER = ("lact_4096_200_test", "delta_net_4096_200_test", "gated_delta_net_4096_200_test", "qwen3_5_4096_200_test")


@pytest.mark.parametrize("family", ["lact", "delta_net", "gated_delta_net", "qwen3_5"])
def test_of_files_for_several_models_the_models_own_is_taken(family: str, tmp_path: Path) -> None:
    """As in the paper's repository, which keeps them in one folder; and a line says which."""
    for name in FOLDER:
        write(tmp_path / f"ruler_squadqa_{name}.jsonl", ROW | {"prompt": name})
    said: list[str] = []
    wanted = Request(["ruler_squadqa"], [4096], 1, None, 1, str(tmp_path), family=family, say=said.append)
    (part,) = collect(wanted, len)
    assert part.examples[0].prompt == f"{family}_4096_200_test" and len(said) == 1
    path = tmp_path / f"ruler_squadqa_{family}_4096_200_test.jsonl"
    assert said[0].endswith(f"at length 4096: {path}, made for {family}, is taken of 4 files")


def test_files_of_which_none_is_the_models_stay_an_error(tmp_path: Path) -> None:
    for name in FOLDER[1:3]:
        write(tmp_path / f"ruler_squadqa_{name}.jsonl", ROW)
    assert "2 files of ruler_squadqa at length 4096: " in failure("ruler_squadqa", tmp_path, 4096)
    with pytest.raises(ConfigError, match="name a folder with one of them"):
        files.find(TASKS["ruler_squadqa"], str(tmp_path), "--data", 4096, family="lact")
    for name in ("delta_net_mine", "delta_net"):
        write(tmp_path / f"{name}/ruler_hotpotqa_{name}_4096_200_test.jsonl", ROW)
    with pytest.raises(ConfigError, match="2 files of ruler_hotpotqa"):
        files.find(TASKS["ruler_hotpotqa"], str(tmp_path), "--data", 4096, family="delta_net")
    (tmp_path / "squad.json").write_text(json.dumps({}), encoding="utf-8")
    assert files.find(TASKS["ruler_squadqa"], str(tmp_path), "--data", 4096, family="delta_net").stem == (
        "ruler_squadqa_delta_net_4096_200_test"
    )
