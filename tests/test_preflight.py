"""What is told before ranks start: a line a problem, without torch, and nothing written."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_refine.config import Config, ConfigError, load
from megatron_refine.convert.fields import fresh_config
from megatron_refine.errors import CheckpointError
from megatron_refine.estimate.flops import total_steps
from megatron_refine.models.family import FAMILIES
from megatron_refine.run import opening, preflight
from tests import runs

ROOT = Path(__file__).parents[1]


def configured(folder: Path, *overrides: str, **sections: dict[str, Any]) -> Config:
    path = runs.write_config(folder, folder / "cache", **sections)
    return load([str(path)], ["refine.reward=cosine", *overrides], FAMILIES)


def refusal(config: Config) -> str:
    with pytest.raises(ConfigError) as error:
        preflight.check(config)
    return str(error.value)


def test_a_run_that_can_begin_is_let_through_and_nothing_is_written(tmp_path: Path) -> None:
    preflight.check(configured(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_it_imports_neither_torch_nor_megatron(tmp_path: Path) -> None:
    configured(tmp_path)
    code = (
        "import sys; from megatron_refine.train import main; main(sys.argv[1:])\n"
        "print([name for name in ('torch', 'megatron', 'wandb', 'matplotlib') if name in sys.modules])"
    )
    line = ["--config", str(tmp_path / "run.yaml"), "--dry-run", "data.paths=[/nope]", "refine.reward=cosine"]
    done = subprocess.run([sys.executable, "-c", code, *line], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.stderr == "data.paths: /nope: no such file or folder; correct the path\n"
    assert done.stdout.endswith("[]\n")


CASES = {
    "text": (["data.paths=[/nope]"], "data.paths: /nope: no such file or folder; correct the path"),
    "held-out text": (["data.valid_paths=[/nope]"], "data.valid_paths: /nope: no such file or folder"),
    "column": (["data.paths=[{folder}/rows.jsonl]"], "data.text_column=text: {folder}/rows.jsonl (data.paths): row 1"),
    "tokenizer": (["data.tokenizer=/nope"], "data.tokenizer: /nope: no such file; name a tokenizer.json"),
    "vocabulary": (["model.vocab_size=100"], "model.vocab_size=100: a byte-level BPE needs 258 or more"),
    "large tokenizer": (["data.tokenizer={golden}", "model.vocab_size=300"], "set model.vocab_size="),
    "model": (["checkpoint.load={folder}"], "checkpoint.load={folder}: holds no model; name a run, a checkpoint or"),
    "another model": (["checkpoint.load={folder}/hf"], "{folder}/hf: is another model; set model.hidden_size=32"),
    "reward": (["refine.reward=nope:f"], "refine.reward=nope:f: cannot be imported"),
    "selection": (["refine.selection=json:dumps"], "refine.selection=json:dumps: called as (entropy [B, T]"),
    "folder": (["run.dir={folder}/rows.jsonl/run"], "{folder}/rows.jsonl/run: {folder}/rows.jsonl is no folder"),
    "baseline": (["run.baseline={folder}"], "run.baseline={folder}: no evaluation in metrics.jsonl; name the run.dir"),
    "cache": (["data.cache_dir={folder}/rows.jsonl/x"], "{folder}/rows.jsonl is no folder; name another folder"),
    "task": (["eval.tasks=[nope]"], "eval.tasks=nope: no such task;"),
    "task's file": (["eval.tasks=[qasper]"], "eval.data: names no folder; qasper is read from a file"),
    "no file of a task": (["eval.tasks=[qasper]", "eval.data={folder}/hf"], "eval.data: {folder}/hf: no file of "),
    "no file of its second length": (
        ["eval.tasks=[ruler_squadqa]", "eval.data={folder}/qa", "eval.lengths=[4096,8192]"],
        "eval.data: {folder}/qa: no file of ruler_squadqa at length 8192",
    ),
    "prompts": (["train.phase=posttrain", "data.tokenizer={golden}"], "task.paths: train.phase=posttrain trains on"),
    "phase's tokenizer": (["train.phase=posttrain", "task.paths=[{folder}/qa.jsonl]"], "data.tokenizer: train.phase="),
    "answers": (["train.phase=posttrain", "task.paths=[{folder}/rows.jsonl]", "data.tokenizer={golden}"], "no column "),
    "interpreter": (["engine.kind=sglang", "engine.python=" + sys.executable], "has no SGLang; install it there, or"),
    "no interpreter": (["engine.kind=sglang", "engine.python=/nowhere/python"], "/nowhere/python: no such interpreter"),
    "key": (["run.wandb=online"], "run.wandb=online: "),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_problem_is_one_line_that_names_its_key(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "rows.jsonl").write_text('{"words": "a"}\n', encoding="utf-8")
    (tmp_path / "qa.jsonl").write_text('{"prompt": "a", "answer": "b"}\n', encoding="utf-8")
    for folder in ("hf", "qa"):
        (tmp_path / folder).mkdir()
    (tmp_path / "qa/ruler_squadqa_4096_200_test.jsonl").write_text('{"prompt": "a", "answer": "b"}\n', encoding="utf-8")
    model = configured(tmp_path).model.model_copy(update={"hidden_size": 32})
    (tmp_path / "hf/config.json").write_text(json.dumps(fresh_config(model, "float32")), encoding="utf-8")
    names = {"folder": tmp_path, "golden": ROOT / "tests/golden/mistral_v1"}
    overrides, expected = CASES[case]
    extra = [] if "data.tokenizer" in "".join(overrides) or "vocab" in case else ["model.vocab_size=512"]
    found = refusal(configured(tmp_path, *(o.format(**names) for o in overrides), *extra))
    assert expected.format(**names) in found, found
    assert len(found.splitlines()) == 1 + ("token ids up to" in found and case != "large tokenizer"), found


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    overrides = ["data.paths=[/a]", "data.tokenizer=/b", "checkpoint.load=/c", "eval.tasks=[d]"]
    assert [line.split(":")[0] for line in refusal(configured(tmp_path, *overrides)).splitlines()] == [
        "data.paths", "data.tokenizer", "checkpoint.load=/c", "eval.tasks=d",
    ]  # fmt: skip


def test_a_disk_without_room_for_a_checkpoint(tmp_path: Path) -> None:
    huge = ["model.hidden_size=1048576", "model.intermediate_size=4194304", "model.num_layers=64"]
    with pytest.raises(CheckpointError, match="disk full: a checkpoint takes"):  # code 4, as later in the run
        preflight.check(configured(tmp_path, *huge))
    assert "a checkpoint takes" in refusal(configured(tmp_path, *huge, "data.paths=[/nope]")).splitlines()[0]


def test_a_process_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that has had its preflight before the imports has none when its ranks have met; others have it then."""
    asked: list[Config] = []
    monkeypatch.setattr(preflight, "check", asked.append)
    for checked in (True, False):
        opening._prepare(configured(tmp_path), checked)
    assert len(asked) == 1


def test_many_nodes_on_the_built_in_text_are_warned_of(tmp_path: Path) -> None:
    own, built_in = configured(tmp_path), configured(tmp_path, "data.paths=[]", "data.valid_paths=[]")
    (line,) = preflight.warnings(built_in, nodes=4)
    assert line.startswith("4 nodes would train from scratch on the sources of Python's standard library")
    assert preflight.warnings(built_in, nodes=1) == preflight.warnings(own, nodes=4) == []


def test_an_interpreter_is_found_from_the_folder_that_one_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    config = configured(tmp_path, "engine.kind=sglang", "engine.python=bin/python")
    assert refusal(config).startswith("engine.python=bin/python: has no SGLang; install it there, or")
    preflight.check(config, in_image=True)  # whose interpreters are not here


def test_a_baseline_of_equal_compute_goes_on_past_train_steps(tmp_path: Path) -> None:
    """It has more steps than train.steps says; beyond its own last one it is refused."""
    more = ["refine.enabled=false", "train.match=compute", "train.steps=20", "model.vocab_size=512"]
    config = configured(tmp_path, *more)
    last = total_steps(config)
    assert last > 21
    for step, refused in ((21, False), (last, False), (last + 1, True)):
        folder = Path(config.run.dir) / f"checkpoints/step_{step:07d}"
        folder.mkdir(parents=True)
        (folder / "COMPLETE").touch()
        if refused:
            assert f"the run has {last + 1} already" in refusal(config)
        else:
            preflight._run(config)


@pytest.mark.parametrize("name", ["checkpoints", "logs"])
def test_a_folder_of_the_run_that_is_elsewhere_and_not_there(tmp_path: Path, name: str) -> None:
    """A disk that is not mounted: the run would begin anew, beside its checkpoints."""
    config = configured(tmp_path, "model.vocab_size=512")
    (tmp_path / "run").mkdir(exist_ok=True)
    link = Path(config.run.dir) / name
    link.symlink_to(tmp_path / "not mounted")
    assert refusal(config).startswith(f"{link}: is no folder, or a link to one that is not there")
    (tmp_path / "not mounted").mkdir()
    preflight._run(config)
