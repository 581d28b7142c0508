"""tools/evaluate.py: scripted models on every task, layouts, held-out loss, kills, and what cannot be asked."""

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from signal import SIGKILL
from typing import Any
from unittest import mock

import pyarrow.parquet as pq
import pytest
import torch

from megatron_refine.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_refine.eval.ruler.haystack import NOISE, read_prose
from megatron_refine.eval.tasks import TASKS
from megatron_refine.models.delta_net.config import DeltaNetConfig
from tests.conversions import hf_folder, write_random
from tests.lanes import short
from tests.rank_report import RankError
from tests.runs import End, _captured
from tests.test_tasks import CASES, DATA, MATCH_ALL, ROUGE, ROUGE_ONE
from tests.zygote import Zygote

LENGTH = 8192  # tokens of a small vocabulary: enough for every task
ROWS = 3
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {"1": (1, ()), "tp2": (2, ("--tp", "2", "--sp")), "dp2": (2, ())}


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> Path:
    """Random weights with a tokenizer."""
    path: Path = tmp_path_factory.mktemp("model") / "hf"
    settings: Any = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 128}
    write_random(path, DeltaNetConfig(family="delta_net", vocab_size=512, **settings))
    train_tokenizer([*read_prose("").sentences[:300], NOISE], 512, path / "tokenizer.json")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: Any) -> Path:
    """A file of every task that is read from one, and the questions of RULER's QA."""
    folder: Path = tmp_path_factory.mktemp("data")
    for name, task in TASKS.items():
        if task.source == "files":
            rows = [{"prompt": f"{name} {i}?", "answers": CASES[name][0]} for i in range(ROWS)]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / (f"{name}_{LENGTH}_3_test.jsonl" if task.sized else f"{name}.jsonl")).write_text(
                text, encoding="utf-8"
            )
    qas = [{"question": f"Which is {i}?", "answers": [{"text": "11th century"}]} for i in range(ROWS)]
    paragraphs = [{"context": f"Text {i}.", "qas": [qa]} for i, qa in enumerate(qas)]
    (folder / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}), encoding="utf-8")
    hotpot = [{"question": f"Who is {i}?", "answer": "11th century", "context": [["T", [f"S {i}."]]]} for i in range(3)]
    (folder / "hotpotqa.json").write_text(json.dumps(hotpot), encoding="utf-8")
    for i in range(5):
        (folder / f"document{i}.txt").write_text(
            " ".join(read_prose("").sentences[9 * i : 9 * i + 1 + i]), encoding="utf-8"
        )
    return folder


def evaluate(arguments: list[str], patch: Callable[[], Any] | None = None) -> End:
    """On a rank: the command; `patch` changes something first."""
    from megatron_refine.cli.evaluate import main

    if patch:
        patch()
    with _captured() as texts:
        code = main(arguments)
    return End(code, *texts)


def arguments(model: Path, data: Path, out: Path, tasks: str, *more: str) -> list[str]:
    return [
        str(model), "--tasks", tasks, "--lengths", str(LENGTH), "--data", str(data), "--examples", str(ROWS),
        "--out", str(out), *more,
    ]  # fmt: skip


def answers(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of all files, in the order of their places."""
    read = {path.stem: map(json.loads, path.read_text(encoding="utf-8").splitlines()) for path in out.glob("*.jsonl")}
    return {name: sorted(rows, key=lambda row: row["place"]) for name, rows in read.items()}


def script(kind: str, task: str, references: tuple[str, ...], place: int) -> tuple[str, float]:
    """What a scripted model says, and what that is worth. The partial model is silent from the third question on."""
    if kind == "empty" or (kind == "partial" and place == 2):
        return "", 0.0
    if kind == "perfect":
        text = " ".join(references) if CASES[task] is MATCH_ALL else references[0]
        return text, ROUGE_ONE if CASES[task] is ROUGE else 1.0
    if TASKS[task].source == "files" or task.startswith("qa_"):
        return CASES[task][1], CASES[task][2]
    half = references[: len(references) // 2]  # of one needle none
    return " ".join(half), len(half) / len(references)


def scripted(kind: str, command: list[str], tasks: list[str], length: int, rows: int | None) -> tuple[End, Any]:
    """On a rank: the command with answers of a script in place of the model's; the means that they are worth."""
    from megatron_refine.checkpoint.source import find
    from megatron_refine.eval import load, suite
    from megatron_refine.eval.answers import Answerer, Question

    wanted = suite.Request(tasks, [length], ROWS, rows, 1, command[command.index("--data") + 1])
    parts = suite.collect(wanted, load.text(find(Path(command[0]))).count)
    said = {e.prompt: script(kind, p.task, e.references, i) for p in parts for i, e in enumerate(p.examples)}

    class Scripted(Answerer):
        def _answer(self, questions: list[Question], prompts: list[list[int]], _: Any) -> list[str]:
            texts = []
            for q in questions:
                ids = self.tokenizer.encode([said[q.prompt][0]])[0]
                assert self.tokenizer.eos_id is not None
                texts.append(self._text(q, [*ids, self.tokenizer.eos_id]))
            return texts

    with mock.patch("megatron_refine.eval.evaluation.Answerer", Scripted):
        end = evaluate(command)
    return end, {p.label: sum(said[e.prompt][1] for e in p.examples) / len(p.examples) for p in parts}


@pytest.mark.parametrize("kind", short(["perfect", "empty", "partial"], lambda kind: kind == "partial"))
def test_scripted_models_score_exactly_on_every_task(
    kind: str, model: Path, data: Path, ranks: Zygote, tmp_path: Path
) -> None:
    command = arguments(model, data, tmp_path / "out", "ruler,ruler_qa,longbench,passage_count,passage_retrieval_en")
    how = {"tasks": list(TASKS), "length": LENGTH, "rows": ROWS}
    end, expected = ranks(1, scripted, kind=kind, command=command, **how)[0]
    assert end.code == 0, end.err
    scores = json.loads((tmp_path / "out/scores.json").read_text(encoding="utf-8"))["tasks"]
    assert scores.keys() == expected.keys() and len(scores) == len(TASKS)
    for label, score in scores.items():
        assert (score["mean"], score["n"]) == (pytest.approx(expected[label], abs=1e-12), ROWS), label
        # two of three answers are worth the same, the third nothing
        error = expected[label] / 2 if kind == "partial" else 0.0
        assert score["error"] == pytest.approx(error, abs=1e-9), label
    right = "100.0 ± 0.0 (n 3)" if kind == "perfect" else "0.0 ± 0.0 (n 3)" if kind == "empty" else "33.3 ± 16.7 (n 3)"
    table = (tmp_path / "out/scores.md").read_text(encoding="utf-8")
    assert end.out.startswith(table) and "| model | niah_single_1 8K | niah_single_2 8K |" in table
    assert f"| {right} |" in table and "Haystacks: prose of the language reference" in table


@pytest.mark.skipif(not DATA.exists(), reason=f"needs the REFINE paper's evaluation files in {DATA}")
@pytest.mark.slow
def test_every_row_of_the_papers_files_is_evaluated(model: Path, ranks: Zygote, tmp_path: Path) -> None:
    """None is dropped, whatever its length; references are answered with themselves."""
    tasks = ["ruler_squadqa", "ruler_hotpotqa", "gov_report", "lcc", "qasper", "samsum", "trec"]
    rows = {path.name.partition("_")[0]: pq.read_metadata(path).num_rows for path in DATA.rglob("longbench/*.parquet")}
    command = [str(model), "--tasks", ",".join(tasks), "--data", str(DATA), "--out", str(tmp_path / "out")]
    how = {"tasks": tasks, "length": 4096, "rows": None}
    end, _ = ranks(1, scripted, kind="perfect", command=command, **how)[0]
    assert end.code == 0, end.err
    scores = json.loads((tmp_path / "out/scores.json").read_text(encoding="utf-8"))["tasks"]
    assert {label: score["n"] for label, score in scores.items()} == {
        "ruler_squadqa@4096": 200, "ruler_hotpotqa@4096": 200, "gov_report": rows["gov"],
        "lcc": rows["lcc"], "qasper": rows["qasper"], "samsum": rows["samsum"], "trec": rows["trec"],
    }  # fmt: skip
    assert all(score["mean"] > 0.97 for score in scores.values())  # which rows cannot be perfect: tests/test_tasks.py
    assert scores["ruler_squadqa@4096"]["mean"] == scores["ruler_hotpotqa@4096"]["mean"] == 1.0


def slow_heldout(model: Path, ids: list[list[int]]) -> list[tuple[float, int]]:
    """On a rank: -log-probability and hits of each document by itself, unpadded, with a plain softmax in fp64."""
    from megatron_refine.checkpoint.source import find
    from megatron_refine.eval import load
    from megatron_refine.trainer import forward
    from megatron_refine.trainer.model import unwrap

    source = find(model)
    loaded = load.load(source, load.layout(source), load.text(source))
    found = []
    with torch.no_grad():
        for document in ids:
            rows = forward.main_pass(loaded.model, torch.tensor([document])).rows
            logprobs = unwrap(loaded.model).logits(rows.local[: len(document) - 1, 0])[:, :512].double().log_softmax(-1)
            truth = torch.tensor(document[1:])
            hits = int((logprobs.argmax(-1) == truth).sum())
            found.append((-float(logprobs.gather(1, truth[:, None]).sum()), hits))
    return found


@pytest.mark.slow
def test_layouts_agree(model: Path, data: Path, ranks: Zygote, tmp_path: Path) -> None:
    """Answers are the same to the letter; held-out sums those of the slow way but for rounding in fp32."""
    documents = [str(data / f"document{i}.txt") for i in range(5)]
    more = ["--heldout", *documents, "--heldout-length", "150", "--lengths", "2048", "--batch-size", "2", "--bos"]
    found = {}
    for name, (world, layout) in LAYOUTS.items():
        command = arguments(model, data, tmp_path / name, "vt,trec,heldout", *more, *layout, "--examples", "5")
        ends = ranks(world, evaluate, arguments=command)
        assert [end.code for end in ends] == [0] * world, ends[0].err
        assert not any(end.out for end in ends[1:])
        found[name] = answers(tmp_path / name)
        assert {label: len(rows) for label, rows in found[name].items()} == {"vt@2048": 5, "trec": 3, "heldout": 5}
    for name in ("tp2", "dp2"):
        for label in ("vt@2048", "trec"):
            assert found[name][label] == found["1"][label]
    texts = [Path(path).read_text(encoding="utf-8") for path in documents]
    encoded = load_tokenizer(model / "tokenizer.json", 512, "").encode(texts)
    ids = [[0, *row][:150] for row in encoded]  # 0 is <bos>
    slow = ranks(1, slow_heldout, model=model, ids=ids)[0]
    for rows in (found[name]["heldout"] for name in LAYOUTS):
        assert [row["tokens"] for row in rows] == [len(row) - 1 for row in ids] and len(set(map(len, ids))) > 2
        assert [row["loss"] for row in rows] == pytest.approx([loss for loss, _ in slow], rel=1e-5)
        assert [row["correct"] for row in rows] == [hits for _, hits in slow]
    heldout = json.loads((tmp_path / "1/scores.json").read_text(encoding="utf-8"))["heldout"]
    tokens = sum(len(row) - 1 for row in ids)
    assert heldout["loss"]["mean"] == pytest.approx(sum(loss for loss, _ in slow) / tokens, rel=1e-5)
    assert heldout["accuracy"]["mean"] == pytest.approx(sum(hits for _, hits in slow) / tokens)
    assert heldout["loss"]["n"] == 5 and heldout["loss"]["error"] > 0


def killed_after(appends: int) -> None:
    """On a rank: the first one ends without a word in the middle of a line, when so many batches were written."""
    from megatron_refine.eval.results import Results

    append, count = Results.append, [0]

    def dying(self: Results, label: str, rows: Any) -> None:
        count[0] += self.writes
        if count[0] > appends:
            with (self.folder / f"{label}.jsonl").open("a", encoding="utf-8") as file:
                file.write('{"place": 1, "inp')
                file.flush()
                os.kill(os.getpid(), SIGKILL)
        append(self, label, rows)

    Results.append = dying  # type: ignore[method-assign]


@pytest.mark.parametrize("layout", short(["1", "tp2"], lambda layout: layout == "1"))
def test_a_killed_evaluation_goes_on(layout: str, model: Path, data: Path, ranks: Zygote, tmp_path: Path) -> None:
    """No answer is asked for twice, none is lost, and the tables are those of an evaluation without a kill."""
    world, more = LAYOUTS[layout]
    common = ["--heldout", str(data / "document0.txt"), str(data / "document1.txt"), "--batch-size", "1", *more]
    command = functools.partial(arguments, model, data)
    job = functools.partial(ranks, world, evaluate)
    with pytest.raises(RankError, match="killed by SIGKILL"):
        job(arguments=command(tmp_path / "killed", "trec,lcc,heldout", *common),
            patch=functools.partial(killed_after, 4))  # fmt: skip
    before = {name: (tmp_path / "killed" / f"{name}.jsonl").read_text(encoding="utf-8") for name in ("trec", "lcc")}
    assert [text.count("\n") for text in before.values()] == [3, 1] and not before["lcc"].endswith("\n")
    ends = [job(arguments=command(tmp_path / name, "trec,lcc,heldout", *common))[0] for name in ("killed", "whole")]
    assert [end.code for end in ends] == [0, 0], ends[0].err
    assert answers(tmp_path / "killed") == answers(tmp_path / "whole")
    assert (tmp_path / "killed/trec.jsonl").read_text(encoding="utf-8") == before["trec"]
    for name in ("scores.json", "scores.md"):
        assert (tmp_path / "killed" / name).read_text(encoding="utf-8") == (tmp_path / "whole" / name).read_text(
            encoding="utf-8"
        )
    stamp = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "whole").iterdir()}
    again = job(
        arguments=command(tmp_path / "whole", "trec,lcc,heldout", *common), patch=functools.partial(killed_after, 0)
    )
    assert again[0].code == 0 and stamp == {
        path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "whole").iterdir()
    }


def test_changed_questions_are_asked_anew(model: Path, data: Path, ranks: Zygote, tmp_path: Path) -> None:
    """Answers stay with the prompts that they were given to; another model's are never mixed in."""
    own = tmp_path / "data"
    own.mkdir()
    lines = (data / "trec.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (own / "trec.jsonl").write_text("".join(lines), encoding="utf-8")
    job = functools.partial(ranks, 1, evaluate)
    assert job(arguments=arguments(model, own, tmp_path / "out", "trec"))[0].code == 0
    first = answers(tmp_path / "out")["trec"]
    (own / "trec.jsonl").write_text(
        "".join([lines[0], json.dumps({"prompt": "Another?", "answers": ["City"]}), "\n"]), encoding="utf-8"
    )
    assert job(arguments=arguments(model, own, tmp_path / "out", "trec"))[0].code == 0
    second = answers(tmp_path / "out")["trec"]
    assert second[0] == first[0] and len(second) == 2 and second[1]["input"] != first[1]["input"]
    for change, key in ((["--precision", "bf16"], "precision"), (["--bos"], "bos")):
        end = job(arguments=arguments(model, own, tmp_path / "out", "trec", *change))[0]
        assert end.code == 2 and f"holds an evaluation whose {key} is " in end.err and end.err.count("\n") == 1
    other = shutil.copytree(model, tmp_path / "other")
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    end = job(arguments=arguments(other, own, tmp_path / "out", "trec"))[0]
    assert end.code == 2 and "holds an evaluation whose weights is " in end.err
    assert answers(tmp_path / "out")["trec"] == second


BAD: list[tuple[list[str], list[str]]] = [
    (["--tasks", "nhia"], ["--tasks=nhia: no such task; did you mean niah?"]),
    (["--tasks", "heldout"], ["--tasks heldout: needs --heldout FILE"]),
    (["--tasks", "heldout", "--heldout", "gone.txt"], ["--heldout", "gone.txt", "no such file"]),
    (["--tasks", "trec", "--data", ""], ["--data: names no folder; trec is read from a file"]),
    (["--tasks", "trec", "--data", "gone"], ["--data", "gone: no such file or folder"]),
    (["--tasks", "ruler_squadqa", "--lengths", "4096"], ["no file of ruler_squadqa at length 4096"]),
    (["--tasks", "niah_single_1", "--lengths", "128"], ["niah_single_1 at length 128", "evaluate at", "or more"]),
    (["--tasks", "niah_single_1", "--lengths", "9" * 20], [f"--lengths={'9' * 20}: must be 1073741824 or"]),
    (["--tasks", "niah_single_1", "--lengths", ""], ["--lengths: names no length"]),
    (["--tasks", "niah_single_2", "--essays", "gone"], ["essays", "gone: no such file or folder"]),
    (["--tasks", "trec", "--tp", "2"], ["tp*cp*pp = 2"]),
    (["--tasks", "trec", "--tokenizer", "gone.json"], ["--tokenizer: gone.json: no such file"]),
    (["--tasks", "trec", "--examples", "-1"], ["--examples=-1"]),
    (["--tasks", "trec", "--batch-size", "0"], ["--batch-size=0"]),
    (["--tasks", ""], ["--tasks", "names no task"]),
]  # fmt: skip


@pytest.mark.parametrize("change, words", BAD, ids=lambda value: " ".join(value)[:40])
def test_what_cannot_be_asked(
    change: list[str], words: list[str], model: Path, data: Path, ranks: Zygote, tmp_path: Path
) -> None:
    """One line, exit code 2, and no folder full of answers."""
    command = [str(model), "--data", str(data), "--out", str(tmp_path / "out"), *change]
    end = ranks(1, evaluate, arguments=command)[0]
    assert (end.code, end.out, end.err.count("\n")) == (2, "", 1), end.err
    assert all(word in end.err for word in words), end.err
    assert not list(tmp_path.glob("out/*.jsonl"))


def test_models_that_cannot_be_loaded(data: Path, ranks: Zygote, tmp_path: Path) -> None:
    damaged = hf_folder(tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    (damaged / "tokenizer.json").unlink()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("", encoding="utf-8")
    codes = {}
    for name, more, words in (
        ("gone", [], "gone: no such folder"),
        ("empty", [], "empty"),
        ("damaged", [], "no tokenizer.json or tokenizer.model came with the model; name one with --tokenizer"),
    ):
        end = ranks(1, evaluate, arguments=arguments(tmp_path / name, data, tmp_path / "out", "trec", *more))[0]
        assert words in end.err and end.err.count("\n") == 1 and not end.out, end.err
        codes[name] = end.code
    assert codes == {"gone": 2, "empty": 2, "damaged": 2}


def test_corrected_answers_are_scored_anew(model: Path, data: Path, ranks: Zygote, tmp_path: Path) -> None:
    """What the model wrote is kept; references are today's. Another limit is another question."""
    own = tmp_path / "data"
    own.mkdir()

    def scores(out: str, *more: Any) -> Any:
        command = arguments(model, own, tmp_path / out, "trec,gov_report")
        end = ranks(1, evaluate, timeout=120, arguments=command, **dict(more))[0]
        assert end.code == 0, end.err
        found = json.loads((tmp_path / out / "scores.json").read_text(encoding="utf-8"))["tasks"]
        return {label: score["mean"] for label, score in found.items()}, end.err

    def ask(limit: int, task: str = "gov_report", told: Any = None) -> None:
        """The task's questions; `told`: the answers that the model gave count as right."""
        rows = [{"prompt": f"{task} {i}?", "answers": ["City"], "max_gen_tokens": limit} for i in range(ROWS)]
        for row, answer in zip(rows, told or [], strict=bool(told)):
            row["answers"] = [answer["prediction"]]
        (own / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    ask(8, "trec")
    ask(16)
    kept = ("patch", functools.partial(killed_after, 0))  # a new answer would be the end
    first, _ = scores("out")
    ask(16, told=answers(tmp_path / "out")["gov_report"])
    corrected, _ = scores("out", kept)
    assert corrected == scores("fresh")[0] and corrected["gov_report"] > 0.9 > first["gov_report"]
    assert answers(tmp_path / "out") == answers(tmp_path / "fresh")
    evaluation = tmp_path / "out/evaluation.json"
    whole = evaluation.read_text(encoding="utf-8")
    evaluation.write_text("", encoding="utf-8")
    with (tmp_path / "out/trec.jsonl").open("ab") as file:
        file.write(bytes(512))
    again, err = scores("out", kept)
    assert again == corrected and evaluation.read_text(encoding="utf-8") == whole
    assert "evaluation.json: damaged; written anew" in err and "trec.jsonl: damaged lines passed over, " in err
    ask(3)
    with pytest.raises(RankError, match="killed by SIGKILL"):
        scores("out", kept)
    assert scores("out")[0] == scores("short")[0]
    assert answers(tmp_path / "out") == answers(tmp_path / "short")
