"""Every table and figure, end to end at tiny scale; the commands at full scale; pages with and without results."""

import argparse
import functools
import json
import os
import re
import shlex
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_refine import cli
from megatron_refine.cli import entropy, evaluate, lm_eval, reproduce, submit
from megatron_refine.config import check_world_size, load
from megatron_refine.convert.fields import fresh_config
from megatron_refine.data.tokenizer import train_tokenizer
from megatron_refine.estimate.flops import total_steps
from megatron_refine.eval.results import SCORES
from megatron_refine.files import write_json
from megatron_refine.models.family import FAMILIES
from megatron_refine.reproduce import running, scores
from megatron_refine.reproduce.chain import Job
from megatron_refine.reproduce.items import ITEMS, LENGTHS, LONGBENCH, MODELS, SHORT
from megatron_refine.reproduce.published import PUBLISHED
from tests.lanes import short
from tests.runs import End, _captured
from tests.zygote import Zygote

ROOT = Path(__file__).parents[1]


def called(words: list[str]) -> End:
    """On a rank: the command, but for what takes seconds: a process's first figures, lm_eval's list of its tasks."""
    from megatron_refine.report import figures

    os.environ["HF_HUB_OFFLINE"] = "1"
    if words[0] == "lm-eval":
        from lm_eval import tasks

        tasks.TaskManager = functools.partial(tasks.TaskManager, include_defaults=False)  # type: ignore

    figures.draw = lambda name, paint, widths=(1,): f"<svg id='{name}'></svg>"
    with _captured() as texts:
        code = cli.run(words[0], words[1:])
    return End(code, *texts)


class Caller:
    """Runs commands on a forked rank, and keeps them."""

    def __init__(self, ranks: Zygote):
        self.ranks, self.words = ranks, list[Sequence[str]]()

    def __call__(self, words: Sequence[str], count: int) -> int:
        assert count == 1
        self.words.append(words)
        start = time.monotonic()
        (end,) = self.ranks(1, called, words=[*words])
        print(f"{time.monotonic() - start:.1f} s")
        assert end.code == 0, (shlex.join(words), end.err)
        return end.code


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reproduce")


ARMS = [*((item, MODELS[0]) for item in ITEMS), ("tab6", MODELS[1])]


@pytest.mark.parametrize(("item", "model"), short(ARMS, lambda item, model: item == "fige2"))
def test_every_item_runs_at_tiny_scale(item: str, model: str, ranks: Zygote, out: Path) -> None:
    """Every command ends well, every arm has numbers, and nothing runs twice."""
    if ITEMS[item].kind == "short":
        pytest.importorskip("lm_eval", reason="needs lm_eval: pip install megatron-refine[eval]")
    caller, line = Caller(ranks), [item, "--scale", "tiny", "--model", model, "--out", str(out)]
    assert reproduce.main(line, caller) == 0
    page, asked = out / f"tiny/{item}.md", len(caller.words)
    text = page.read_text(encoding="utf-8")
    rows = [row.split(" | ") for row in text.splitlines() if "| ours |" in row or row.startswith("| k=")]
    assert all(any("n 2)" in cell or "step" in cell or "." in cell for cell in row[2:]) for row in rows), text
    assert len(rows) == len(ITEMS[item].rows) or ITEMS[item].kind in ("steps", "entropy"), text
    assert ITEMS[item].note in text and "Tiny scale" in text
    if item.startswith("fig"):
        figure = page.with_suffix(".svg") if item != "fige2" else out / f"tiny/{model}/scores/start/entropy.svg"
        assert figure.read_text(encoding="utf-8").startswith("<svg") and figure.name in text
    assert reproduce.main(line, caller) == 0 and len(caller.words) == asked
    assert page.read_text(encoding="utf-8") == text


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The options of a reproduction at full scale; a folder's name has a blank, which shells do not forgive."""
    folder = tmp_path_factory.mktemp("of the reader")
    train_tokenizer([Path(argparse.__file__).read_text(encoding="utf-8")], 512, folder / "tokenizer.json")
    for model in MODELS:
        (folder / model).mkdir()
        config = fresh_config(load([f"configs/midtrain_{model}.yaml"], [], FAMILIES).model, "float32")
        (folder / model / "config.json").write_text(json.dumps(config), encoding="utf-8")
        for task in ("ruler_squadqa", "ruler_hotpotqa"):
            for length in LENGTHS:
                for split in ("1600_train", "200_test"):
                    name = f"qa/{task}_{model.rsplit('_', 1)[0]}_{length}_{split}.jsonl"
                    write_rows(folder / name)
    for task in LONGBENCH:
        write_rows(folder / f"longbench/{task}_16384.jsonl")
    write_rows(folder / "documents.jsonl")
    options = ["--start", *(f"{model}={folder / model}" for model in MODELS), "--tokenizer",
               str(folder / "tokenizer.json"), "--train-data", str(folder / "documents.jsonl"), "--booksum",
               str(folder / "documents.jsonl"), "--ruler-qa", str(folder / "qa"), "--longbench",
               str(folder / "longbench"), "--text", str(folder / "documents.jsonl")]  # fmt: skip
    return [*options, "--out", str(folder / "out")]


def write_rows(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"text": "a", "prompt": "a", "answers": ["b"]}\n', encoding="utf-8")


def commands(text: str) -> list[list[str]]:
    """The words of each command of a script."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line and not line.startswith(("#", "mkdir -p "))]


def test_all_commands_of_full_scale_are_such(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Each is one that the command line takes, and each training one that its ranks can run."""
    assert reproduce.main(["all", *given]) == 0
    found, seen = commands(capsys.readouterr().out), set()
    assert len({tuple(words) for words in found}) == len(found)
    for words in found:
        program, count = words[0], int(words[words.index("--nproc-per-node") + 1]) if words[0] == "torchrun" else 1
        command, *rest = words[words.index("megatron_refine") + 1 :] if program == "torchrun" else words[1:]
        seen.add((command, count))
        if command == "train":
            start = 2 if rest[0] == "--ranks" else 0
            files = rest[start + 1 : start + 4 : 2]
            config = load(files, rest[start + 4 :], FAMILIES)
            check_world_size(config, int(rest[1]))
            assert config.checkpoint.load and Path(config.data.tokenizer).exists()
            assert config.ttt.reset == "online" and config.engine.mask_gap == 1e9  # of official.yaml
        elif command == "evaluate":
            assert evaluate.parse(rest).tasks
        elif command == "entropy":
            assert entropy.parse(rest).text.exists()
        elif command == "lm-eval":
            assert lm_eval.parse(rest).tasks.count(",") == len({label.split()[0] for label in SHORT.values()}) - 1
    assert seen == {(name, 1) for name in ("prepare", "train", "entropy")} | {("evaluate", 8), ("lm-eval", 8)}


def test_the_page_counts_what_each_item_takes(given: list[str]) -> None:
    """docs/reproduction.md, of one model."""
    table = (ROOT / "docs/reproduction.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \|.*?\| ([^|]*\|[^|]*) \|$", table, re.MULTILINE))
    options = reproduce.parse(["all", *given])
    items, models, setting = reproduce.asked(options)
    for name, asked in ({item: [item] for item in items} | {"all": items}).items():
        jobs = [job for job in running.listed(setting, asked, models[:1]) if job.words[0] != "prepare"]
        phases = [job.config.train.phase for job in jobs if job.config is not None]
        words = {"mid": "midtrain", "post": "posttrain", "test-time": "testtime"}
        counts = [f"{phases.count(phase)} {word}" for word, phase in words.items() if phase in phases]
        said = [cell.strip() for cell in rows[name].split("|")]
        assert said == [", ".join(counts), str(len(jobs) - len(phases) or "")], name


def test_trainings_go_to_slurm(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On as many nodes as feed their mini-batch; those that wait for weights later; none twice."""
    (tmp_path / "site.yaml").write_text("gpus_per_node: 8\n", encoding="utf-8")
    line = ["tab5", *given, "--model", MODELS[1], "--nodes", "3", "--site", str(tmp_path / "site.yaml")]
    assert reproduce.main(line) == 0
    jobs = [submit.build(submit.parse(words[2:])) for words in commands(capsys.readouterr().out)
            if words[1] == "submit"]  # fmt: skip
    assert [(job.nodes, job.site.gpus_per_node) for job in jobs] == [(1, 8)] * 2 + [(1, 4)] * 24
    sent: list[Sequence[str]] = []

    def call(words: Sequence[str], ranks: int) -> int:
        sent.append(words)
        logs = Path(next(word for word in words if word.startswith("run.dir=")).partition("=")[2].strip("'\"")) / "logs"
        logs.mkdir(parents=True)
        (logs / "1.sbatch").touch()
        return 0

    assert reproduce.main([*line, "--run"], call) == 0 and len(sent) == 2
    assert "24 trainings wait for others" in capsys.readouterr().out
    assert reproduce.main([*line, "--run"], call) == 0 and len(sent) == 2
    assert "mid_sft: submitted before" in capsys.readouterr().out


def test_printed_averages_are_those_of_their_cells() -> None:
    """But the one that the page of table 3 names; cells and averages are rounded."""
    odd = []
    for table, models in PUBLISHED.items():
        for model, rows in models.items():
            for run, text in rows.items():
                numbers = [float(number) for number in text.split()]
                size = {"niah": 4, "ruler_qa": 4, "longbench": 13, "short": 11, "longbench_mean": 1}[table]
                assert len(numbers) == {"niah": 16, "ruler_qa": 8}.get(table, size)
                for at in range(0, len(numbers) if size > 1 else 0, size):
                    cells, printed = numbers[at + 4 * (table == "short") : at + size - 1], numbers[at + size - 1]
                    if abs(statistics.fmean(cells) - printed) > 0.1 + 1e-9:
                        odd.append((model, run, table, cells, printed))
                if table == "longbench":
                    assert [numbers[-1]] == [float(PUBLISHED["longbench_mean"][model][run])]
    assert odd == [("lact_760m", "start", "niah", [70.2, 44.8, 24.2], 46.2)]
    for item in ITEMS.values():
        for rows in PUBLISHED.get(item.table, {}).values():
            known = {row.runs[0] for row in item.rows} & rows.keys()
            assert all(len(rows[run].split()) == len(item.columns) for run in known)


@pytest.mark.parametrize("item", ["tab3", "fig5", "fige3", "fige2", "tabe1"])
def test_a_page_without_results_has_dashes(item: str, tmp_path: Path) -> None:
    assert reproduce.main([item, "--collect", "--out", str(tmp_path)]) == 0
    text = (tmp_path / f"full/{item}.md").read_text(encoding="utf-8")
    for row in text.splitlines():
        if "| ours |" in row:
            assert set(row.partition("| ours |")[2].replace("|", "").split()) == {"-"}
    assert all(f"## {model}" in text for model in MODELS) and "nan" not in text
    assert ("| 98.8 |" in text) == (item == "tab3") and not (tmp_path / "full/fige3.svg").exists()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["tab9"], ["ITEM tab9: unknown; choose of tab3, "]),
        (["tab3", "--model", "gpt"], ["--model gpt: unknown; choose of delta_net_1.3b, lact_760m"]),
        (["tab3", "--start", "gpt=a"], ["--start gpt=a: reads MODEL=FOLDER"]),
        (["train.steps=1"], ["ITEM: names no table or figure"]),
        (["fige2", "--model", MODELS[0], "--start", f"{MODELS[0]}=gone", "--text", "gone"],
         ["--start=gone: no such folder", "--text gone: no such file or folder"]),
        (["tab4", "--model", MODELS[0]],
         ["--train-data: missing", "--booksum: missing", "--ruler-qa: missing", f"--start: missing for {MODELS[0]}"]),
        (["tab3", "--nodes", "-1"], ["--nodes=-1: must be 0 or more"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_a_line(line: list[str], says: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce.main(line) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(says) and all(a.startswith(b) for a, b in zip(lines, says, strict=True)), lines


def test_files_that_are_not_there(given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "qa/ruler_squadqa_lact_4096_200_test.jsonl")
    line = ["tab4", *given, "--model", "lact_760m", "--ruler-qa", str(tmp_path / "qa")]
    assert reproduce.main(line) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 11 and "0 files like ruler_hotpotqa_lact_16384_200_test.parquet" in said
    assert reproduce.main(["tab3", *given, "refine.num_chunk=4"]) == 2
    assert "refine.num_chunk: unknown key" in capsys.readouterr().err


def test_a_command_that_fails_ends_it(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """With its code; and the page is written all the same."""
    line = ["fige3", *given, "--model", MODELS[0], "--run", "train.steps=3"]
    assert reproduce.main(line, lambda words, ranks: 4) == 4
    said = capsys.readouterr().out
    assert "prepare: ended with code 4" in said and "fige3.md" in said and "mid_k3" not in said


def test_what_was_made_otherwise_is_not_taken_for_done(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is started; what changes no result may change."""
    line = ["tab3", *given, "--model", MODELS[0], "--out", str(tmp_path)]

    def finish(words: Sequence[str], ranks: int) -> int:
        """Leave what tells that a command is done."""
        if words[0] == "train":
            folder = Path(next(word for word in words if word.startswith("run.dir=")).partition("=")[2])
            saved = folder / "checkpoints/step_0000003"
            saved.mkdir(parents=True, exist_ok=True)
            (saved / "COMPLETE").write_text(f"{len(str(folder)):064}", encoding="utf-8")
        if words[0] == "evaluate":
            options = evaluate.parse([*words[1:]])
            labels = [f"{task}@{length}" for task in options.tasks for length in options.lengths]
            write_json(options.out / SCORES, {"tasks": {label: {"mean": 0, "error": 0, "n": 1} for label in labels}})
        return 0

    assert reproduce.main([*line, "--run", "train.steps=3"], finish) == 0
    capsys.readouterr()
    same = ["--run", "train.steps=3", "parallel.tp=2", "--ranks", "4"]
    assert reproduce.main([*line, *same], finish) == 0 and "scores/start/niah: done before" in capsys.readouterr().out
    (tmp_path / "essays").mkdir()
    assert reproduce.main([*line, "--essays", str(tmp_path / "essays"), *same], lambda *_: 1 / 0) == 2
    said = capsys.readouterr().err.splitlines()
    assert said and all(f"was made with less, now --essays {tmp_path}/essays; name another --out" in x for x in said)
    for mark in (tmp_path / "reproduce").parent.rglob("COMPLETE"):
        mark.write_text("trained anew", encoding="utf-8")
    assert reproduce.main([*line, *same], lambda *_: 1 / 0) == 2
    said = capsys.readouterr().err.splitlines()
    assert said and all(re.search(r"was made with weights=0+\d*, now weights=trained anew; name", x) for x in said)


def test_a_perplexity_of_the_harness_is_no_share(tmp_path: Path) -> None:
    found = {"perplexity,none": 12.5, "perplexity_stderr,none": 0.5, "acc,none": 0.25, "acc_stderr,none": 0.02}
    results = {"results": {"lambada": found}, "n-samples": {"lambada": {"effective": 8}}}
    write_json(tmp_path / "lm_eval.json", results)
    chain: Any = SimpleNamespace(evaluated=lambda run, name: tmp_path / name, short=list)
    values = [scores.score(chain, "short", "start", f"lambada {metric}") for metric in ("perplexity", "acc", "none")]
    assert values == [scores.Value(12.5, 0.5, 8), scores.Value(25.0, 2.0, 8), None]


def test_a_training_is_done_at_its_last_step(tmp_path: Path) -> None:
    """Ask for more than train.steps of a baseline of equal compute."""
    config = load("configs/quickstart.yaml", ["refine.enabled=false", "train.match=compute"], FAMILIES)
    job = Job("ntp", ("train",), tmp_path, config=config)
    for step, done in ((config.train.steps, False), (total_steps(config) - 1, False), (total_steps(config), True)):
        folder = tmp_path / f"checkpoints/step_{step:07d}"
        folder.mkdir(parents=True)
        (folder / "COMPLETE").touch()
        assert job.done == done, step
