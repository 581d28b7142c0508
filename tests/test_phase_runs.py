"""Whole runs of post-training and test-time training, from their presets too; kills; what cannot be."""

import argparse
import ast
import functools
import json
import random
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest
import torch

from megatron_refine.config import ConfigError, load
from megatron_refine.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_refine.models.family import FAMILIES
from tests import runs
from tests.lanes import short
from tests.rank_report import RankError
from tests.runs import TP2, Fault
from tests.zygote import Zygote

ROOT = Path(__file__).parents[1]
PRESETS = sorted(path.stem for path in (ROOT / "configs").glob("*time_*.yaml")) + sorted(
    path.stem for path in (ROOT / "configs").glob("*train_*.yaml")
)
SHORT = ("posttrain_lact_760m",)
ROWS = 11  # with batches of 4 the last one has three prompts


@pytest.fixture(scope="module")
def files(tmp_path_factory: Any) -> Path:
    """A tokenizer and prompts with answers: a number in a text."""
    folder, draw = tmp_path_factory.mktemp("prompts"), random.Random(4)
    train_tokenizer([Path(argparse.__file__).read_text(encoding="utf-8")], 512, folder / "tokenizer.json")
    with (folder / "numbers.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(ROWS):
            text = " ".join(draw.choice(("the grass is green", "parser.add", "return self")) for _ in range(20))
            number = str(draw.randrange(100, 1000))
            row = {"prompt": f"The number is {number}. {text} What is the number?", "answers": [number, "none"]}
            file.write(json.dumps(row) + "\n")
    return folder


def sections(files: Path, phase: str, **more: dict[str, Any]) -> dict[str, dict[str, Any]]:
    own: dict[str, dict[str, Any]] = {
        "data": {"paths": [], "valid_paths": [], "tokenizer": str(files / "tokenizer.json")},
        "task": {"paths": [str(files / "numbers.jsonl")], "max_new_tokens": 6},
        "train": {"phase": phase, "steps": 4},
    }
    return {name: own.get(name, {}) | more.get(name, {}) for name in own.keys() | more.keys()}


def predictions(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in (folder / "run" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    ]


@pytest.mark.parametrize("preset", short(PRESETS, lambda preset: preset in SHORT))
def test_every_preset_runs_scaled_down(preset: str, ranks: Zygote, files: Path, tmp_path: Path) -> None:
    """The preset as it stands, but for its size: on two ranks, and nothing of it is changed by hand."""
    phase, _, model = preset.partition("_")
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_bytes((files / "tokenizer.json").read_bytes())
    arguments = [
        "--config", str(ROOT / "configs" / f"{preset}.yaml"), f"model={model.rsplit('_', 1)[0]}_tiny",
        "data.seq_length=512", f"data.tokenizer={tokenizer}", f"data.cache_dir={tmp_path / 'cache'}",
        "train.precision=fp32", "train.steps=1", "train.global_batch_size=4", "update.mini_batch_size=2",
        f"run.dir={tmp_path / 'run'}", "eval.every=0", *TP2,
    ]  # fmt: skip
    if phase == "midtrain":
        arguments += [
            f"data.paths=[{argparse.__file__},{random.__file__}]",
            "data.split_documents=true",
            "eval.sequences=2",
        ]
    else:
        arguments += [f"task.paths=[{files / 'numbers.jsonl'}]", "task.max_new_tokens=3"]
    ends = ranks(2, runs.command, arguments=arguments, saves=False)
    assert [end.code for end in ends] == [0, 0], ends[0].err
    rows = [row for row in runs.rows(tmp_path) if "train/loss" in row]
    assert len(rows) == (3 if phase == "testtime" else 1)
    assert all(row["train/optimizer_steps"] == {"midtrain": 2, "posttrain": 3}.get(phase, 2) for row in rows)
    assert all("rollout/reward_mean" in row for row in rows)
    if phase == "testtime":
        assert [row["index"] for row in predictions(tmp_path)] == list(range(ROWS))
        assert "numbers  " in ends[0].out and f"(n {ROWS})" in ends[0].out
        report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
        assert "<h2>Answers</h2>" in report and "<td>numbers</td>" in report


@pytest.mark.slow
@pytest.mark.parametrize(("reset", "world"), [("per_batch", 2), ("online", 1)])
def test_a_killed_test_time_run_goes_on_as_if_nothing_had_happened(
    reset: str, world: int, ranks: Zygote, files: Path, tmp_path: Path
) -> None:
    """Every prompt is answered once, with the answers and losses of the uninterrupted run."""
    ends = {}
    for name in ("whole", "killed"):
        more: Any = {"ttt": {"reset": reset}, "checkpoint": {"every": 1}}
        (tmp_path / name).mkdir()
        config = runs.write_config(tmp_path / name, tmp_path / "cache", **sections(files, "testtime", **more))
        arguments = ["--config", str(config), *(TP2 if world == 2 else ())]
        job = functools.partial(ranks, world, runs.command, arguments=arguments)
        if name == "killed":
            with pytest.raises(RankError, match="killed by SIGKILL"):
                job(fault=Fault(3, SIGKILL, rank=world - 1))
            assert 4 <= len(predictions(tmp_path / name)) <= 8
        ends[name] = job()[0]
        assert ends[name].code == 0, ends[name].err
    assert predictions(tmp_path / "killed") == predictions(tmp_path / "whole")
    assert [row["index"] for row in predictions(tmp_path / "whole")] == list(range(ROWS))
    assert runs.rows(tmp_path / "killed") == runs.rows(tmp_path / "whole")
    assert ("step 2/3" if reset == "online" else "step 2/3") in ends["killed"].out
    assert (tmp_path / "whole" / "run" / "checkpoints").exists() == (reset == "online")


def learned(path: Path) -> list[bool]:
    """On a rank: whether each weight is bit by bit what it was before the run, after each batch."""
    from megatron_refine.run.session import Session
    from megatron_refine.run.watchdog import Watchdog
    from megatron_refine.train import train

    with Session(load(str(path), [], FAMILIES), Watchdog(60)) as session:
        model, same = session.updater.model, []
        before = [parameter.detach().clone() for parameter in model.parameters()]
        step = session.train_step

        def observed(refine: bool) -> Any:
            metrics = step(refine)
            same.append(all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)))
            return metrics

        session.train_step = observed  # type: ignore[method-assign]
        assert train(session) == 0
    return same


@pytest.mark.parametrize(
    "reset, same",
    short([("per_batch", [True] * 3), ("online", [False] * 3)], lambda reset, same: reset == "per_batch"),
)
def test_test_time_training_leaves_the_base_weights(
    reset: str, same: list[bool], ranks: Zygote, files: Path, tmp_path: Path
) -> None:
    """Bit by bit after every batch, and the first prompts are answered alike with either reset."""
    config = runs.write_config(tmp_path, tmp_path, **sections(files, "testtime", ttt={"reset": reset}))
    assert ranks(1, learned, path=config) == [same]


def test_batches_do_not_depend_on_those_before(ranks: Zygote, files: Path, tmp_path: Path) -> None:
    """per_batch: from the same weights, the loss of a batch is the same wherever it stands; online: it is not."""
    lines = (files / "numbers.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "twice.jsonl").write_text("".join(lines[:4] * 2), encoding="utf-8")
    losses = {}
    for reset in ("per_batch", "online"):
        folder = tmp_path / reset
        folder.mkdir()
        own = sections(files, "testtime", ttt={"reset": reset}, refine={"enabled": False})
        own["task"]["paths"] = [str(tmp_path / "twice.jsonl")]
        ends = ranks(
            1, runs.command, arguments=["--config", str(runs.write_config(folder, folder, **own))], saves=False
        )
        assert ends[0].code == 0, ends[0].err
        losses[reset] = [row["train/loss"] for row in runs.rows(folder) if "train/loss" in row]
    assert losses["per_batch"][0] == losses["per_batch"][1] == losses["online"][0] > losses["online"][1]


def test_post_training_evaluates_answers(ranks: Zygote, files: Path, tmp_path: Path) -> None:
    """Nested SFT: an NTP step and a step on the answers; the answers of valid prompts are scored on the way."""
    own = sections(files, "posttrain", refine={"enabled": False}, eval={"every": 2, "examples": 5})
    own["task"]["valid_paths"] = own["task"]["paths"]
    config = runs.write_config(tmp_path, tmp_path, **own)
    ends = ranks(1, runs.command, arguments=["--config", str(config)], saves=False)
    assert ends[0].code == 0, ends[0].err
    rows = runs.rows(tmp_path)
    assert [row["step"] for row in rows if "task/valid" in row] == [0, 2, 4]
    losses = [row["train/answer_loss"] for row in rows if "train/answer_loss" in row]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert "eval step 2: valid" in ends[0].out and "(n 5)" not in ends[0].err


BAD: list[tuple[str, str, list[str]]] = [
    ("midtrain", "", ["task.paths", "train.phase=posttrain"]),
    ("posttrain", "task.inner_step=false", ["task.inner_step=false", "refine.enabled=false"]),
    ("posttrain", "train.match=compute", ["train.match=compute", "refine.enabled=false"]),
    ("testtime", "optimizer.warmup_steps=3", ["optimizer.warmup_steps=3", "optimizer.schedule=constant"]),
    ("testtime", "ttt.reset=never", ["ttt.reset='never'", "'per_batch' or 'online'"]),
    ("testtime", "train.phase=test", ["train.phase='test'", "'testtime'"]),
    ("posttrain", "model=gpt", ["model=gpt: unknown", "delta_net_tiny"]),
]


@pytest.mark.parametrize("phase, override, words", BAD)
def test_contradictions_are_one_line(phase: str, override: str, words: list[str], files: Path, tmp_path: Path) -> None:
    path = runs.write_config(tmp_path, tmp_path, **sections(files, phase))
    with pytest.raises(ConfigError) as error:
        load(str(path), [override] if override else [], FAMILIES)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


def test_a_prompt_is_never_cut(files: Path, tmp_path: Path) -> None:
    """A row that is too long is an error that names it, or is left out and counted."""
    from megatron_refine.data.prompts import read_prompts

    tokenizer = load_tokenizer(files / "tokenizer.json", 512, "")
    path = runs.write_config(tmp_path, tmp_path, **sections(files, "posttrain"))
    whole = read_prompts(load(str(path), ["data.seq_length=512"], FAMILIES), tokenizer, None)
    lengths = [len(p) + len(a) for p, a in zip(whole.prompts, whole.answers, strict=True)]
    longest = max(lengths)
    fits = load(str(path), [f"data.seq_length={longest}"], FAMILIES)
    assert len(read_prompts(fits, tokenizer, None)) == ROWS
    tight = load(str(path), [f"data.seq_length={longest - 1}"], FAMILIES)
    row = lengths.index(longest)
    with pytest.raises(ConfigError, match=f"row {row} of task numbers: has {longest} tokens, its answer included"):
        read_prompts(tight, tokenizer, None)
    with pytest.raises(ConfigError, match=f"row {row} of task numbers: has {longest + 1} tokens"):
        read_prompts(fits, tokenizer, bos=0)
    skips = "task.skip_too_long=true"
    said: list[str] = []
    short_rows = load(str(path), [f"data.seq_length={longest - 1}", skips], FAMILIES)
    left = read_prompts(short_rows, tokenizer, None, said.append)
    assert f"{left.skipped} of {ROWS} rows left out: longer than data.seq_length={longest - 1}" in said[-1]
    assert len(read_prompts(load(str(path), [f"data.seq_length={longest}", skips], FAMILIES), tokenizer, None)) == ROWS
    assert left.skipped == lengths.count(longest) and len(left) == ROWS - left.skipped
    assert left.fingerprint != whole.fingerprint


def test_an_eos_that_ends_each_answer_has_to_fit(files: Path, tmp_path: Path) -> None:
    from megatron_refine.data.prompts import read_prompts

    tokenizer = load_tokenizer(files / "tokenizer.json", 512, "")
    path = runs.write_config(tmp_path, tmp_path, **sections(files, "posttrain"))

    def read(length: int, *overrides: str) -> Any:
        return read_prompts(load(str(path), [f"data.seq_length={length}", *overrides], FAMILIES), tokenizer, None)

    plain, ended = read(512), read(512, "task.add_eos=true")
    assert [a.tolist() for a in ended.answers] == [[*a.tolist(), tokenizer.eos_id] for a in plain.answers]
    longest = max(len(p) + len(a) for p, a in zip(ended.prompts, ended.answers, strict=True))
    assert len(read(longest, "task.add_eos=true")) == len(read(longest - 1)) == ROWS
    with pytest.raises(ConfigError, match=f"has {longest} tokens, its answer included, more than"):
        read(longest - 1, "task.add_eos=true")
    tokenizer.eos_id = None
    with pytest.raises(ConfigError, match=r"task\.add_eos=true: .* has no EOS token; set task\.add_eos=false"):
        read(512, "task.add_eos=true")


def test_batches_of_prompts(files: Path, tmp_path: Path) -> None:
    """Answers follow prompts; a row -1 is empty; what comes after a row's end is 0."""
    from megatron_refine.data.prompts import read_prompts

    tokenizer = load_tokenizer(files / "tokenizer.json", 512, "")
    config = load(str(runs.write_config(tmp_path, tmp_path, **sections(files, "posttrain"))), [], FAMILIES)
    found = read_prompts(config, tokenizer, bos=7)
    batch, lengths = found.batch([2, -1], [5, 6], [2, 3], 8, answers=True)
    prompt, answer = found.prompts[2].tolist(), found.answers[2].tolist()
    assert prompt[0] == 7 and tokenizer.decode(prompt[1:]) == found.examples[2].prompt
    assert (
        batch.tokens[0].tolist()[: len(prompt + answer)] == prompt + answer and not batch.tokens[0, lengths[0] :].any()
    )
    assert batch.lengths.tolist() == [len(prompt), 0] and lengths.tolist() == [len(prompt + answer), 0]
    assert not batch.tokens[1].any() and batch.sample_ids.tolist() == [5, 6] and batch.tokens.shape[1] % 64 == 0
    assert not found.batch([2], [0], [2], 8, answers=False)[0].tokens[0, len(prompt) :].any()


@pytest.mark.slow
def test_a_run_evaluates_tasks_on_its_way(ranks: Zygote, tmp_path: Path) -> None:
    """Generated tasks and files, at their steps and at both ends, on the screen, in the metrics and in the report."""
    rows = [{"prompt": f"Type of question {i}", "answers": ["City"]} for i in range(3)]
    (tmp_path / "trec_512.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    evaluation = {"every": 2, "tasks": ["trec", "niah_single_1"], "lengths": [1024, 768], "examples": 2}
    config = runs.write_config(
        tmp_path, tmp_path / "cache", eval=evaluation | {"data": str(tmp_path), "batch_size": 4}, train={"steps": 3}
    )
    ends = ranks(2, runs.command, arguments=["--config", str(config), *TP2], saves=False)
    assert [end.code for end in ends] == [0, 0], ends[0].err
    keys = {"task/trec", "task/niah_single_1@768", "task/niah_single_1@1024"}
    found = [row for row in runs.rows(tmp_path) if "task/trec" in row]
    assert [row["step"] for row in found] == [0, 2, 3] and all(keys <= row.keys() for row in found)
    assert "eval step 2: trec 0.0 ± 0.0, niah_single_1@768 0.0 ± 0.0, niah_single_1@1024 0.0 ± 0.0" in ends[0].out
    assert "niah_single_1@768" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "evaluation, words",
    [
        ({"tasks": ["nhia"]}, "eval.tasks=nhia: no such task; did you mean niah?"),
        ({"tasks": ["trec"]}, "eval.data: names no folder; trec is read from a file"),
        ({"tasks": ["trec"], "data": "gone"}, "eval.data: gone: no such file or folder"),
        ({"tasks": ["niah_single_1"], "lengths": [128]}, "niah_single_1 at length 128: the smallest haystack"),
        ({"tasks": ["vt"], "lengths": []}, "eval.lengths: names no length"),
    ],
)
def test_tasks_that_a_run_cannot_evaluate(evaluation: Any, words: str, ranks: Zygote, tmp_path: Path) -> None:
    config = runs.write_config(tmp_path, tmp_path / "cache", eval=evaluation)
    end = ranks(1, runs.command, arguments=["--config", str(config)])[0]
    assert end.code == 2 and end.err.startswith(words) and end.err.count("\n") == 1, end.err


@pytest.mark.slow
def test_batches_that_start_from_the_same_weights_start_from_no_others(
    ranks: Zygote, files: Path, tmp_path: Path
) -> None:
    """Neither in a run that goes on, nor in a finished one that is started again."""
    for seed in (1, 2):
        (tmp_path / str(seed)).mkdir()
        more: Any = {"run": {"dir": str(tmp_path / f"{seed}/run"), "seed": seed}, "train": {"steps": 1}}
        config = runs.write_config(tmp_path / str(seed), tmp_path / "cache", refine={"enabled": False}, **more)
        assert ranks(1, runs.command, arguments=["--config", str(config)])[0].code == 0
    config = runs.write_config(tmp_path, tmp_path / "cache", **sections(files, "testtime"))
    job = functools.partial(ranks, 1, runs.command)
    line = ["--config", str(config), "ttt.reset=per_batch"]
    first, other = (f"checkpoint.load={tmp_path / str(seed) / 'run'}" for seed in (1, 2))
    assert job(arguments=[*line, first])[0].code == 0
    answers = predictions(tmp_path)
    assert job(arguments=[*line, first])[0].code == 0
    end = job(arguments=[*line, other])[0]
    assert end.code == 2 and f"{other}: is not what the batches so far have started from" in end.err, end.err
    assert predictions(tmp_path) == answers


@pytest.mark.slow
def test_a_model_goes_on_with_its_tokenizer(ranks: Zygote, tmp_path: Path) -> None:
    """Take that of checkpoint.load where none is named: one of other text gives the weights other ids."""
    start, on = (tmp_path / name for name in ("start", "on"))
    lines = []
    for folder, text in ((start, argparse), (on, random)):
        folder.mkdir()
        data = {"paths": [text.__file__], "valid_paths": [ast.__file__]}
        config = runs.write_config(folder, tmp_path / "cache", refine={"enabled": False}, train={"steps": 1}, data=data)
        lines.append(["--config", str(config)])
    assert ranks(1, runs.command, arguments=lines[0])[0].code == 0
    assert ranks(1, runs.command, arguments=lines[1], saves=False)[0].code == 0  # leaves a tokenizer, no checkpoint
    line = [*lines[1], f"checkpoint.load={start / 'run'}"]
    assert ranks(1, runs.command, arguments=line)[0].code == 0
    tokenizers = [(folder / "run/tokenizer.json").read_bytes() for folder in (start, on)]
    assert tokenizers[0] == tokenizers[1]
    (start / "run").rename(tmp_path / "gone")
    for steps in (2, 3):  # also where checkpoint.load is left out, which then says nothing more
        words = [*(line if steps == 2 else lines[1]), f"train.steps={steps}"]
        end = ranks(1, runs.command, arguments=words)[0]
        assert end.code == 0 and f"step {steps}/{steps}" in end.out, end.err
