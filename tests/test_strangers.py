"""What is not ours in a run's folders is left alone: copies, links, files. What was written last is never removed."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_refine.checkpoint import manifest
from megatron_refine.checkpoint.manifest import complete_folders, read_manifest, seal, step_folder, unfinished_folders
from megatron_refine.checkpoint.source import find
from megatron_refine.errors import CheckpointError, DamagedError
from megatron_refine.files import numbered
from megatron_refine.report.folder import RunFolder
from megatron_refine.report.html import write_report
from tests.parity import small_config
from tests.test_checkpoint import start


def written(root: Path, step: int, text: str = "weights") -> Path:
    """A sealed checkpoint whose payload is a text."""
    folder = root / f".incomplete-7-0-host-12-step_{step:07d}"
    folder.mkdir(parents=True)
    (folder / "payload").write_text(text, encoding="utf-8")
    contents = {"step": step, "model": {}, "layout": [1, 1, 1, 1], "files": manifest.hashes(folder)}
    seal(folder, step_folder(root, step), contents)
    return step_folder(root, step)


def strangers(root: Path, newest: Path) -> set[str]:
    """Put what users put beside checkpoints; the names."""
    for name in (
        "step_best",
        "step_0000001.bak",
        "step_0000001-copy",
        "my step_3",
        "step_0000900",
        "step_-5",
        "step_٣",
    ):
        shutil.copytree(newest, root / name)
    (root / "latest_good").symlink_to(newest.name)
    (root / "step_0000901").symlink_to(newest.name)
    (root / "step_0000902").write_text("notes", encoding="utf-8")
    (root / ".incomplete-notes").mkdir()
    (root / ".incomplete-step_0000003.txt").write_text("notes", encoding="utf-8")
    (root / ".incomplete-step_0000004").symlink_to(newest.name)
    return {path.name for path in root.iterdir()} - {newest.name, "latest"}


def test_of_a_folder_only_real_folders_of_our_names_are_ours(tmp_path: Path) -> None:
    strangers(tmp_path, written(tmp_path, 1))
    for step in (9999999, 10000000, 2):
        written(tmp_path, step)
    names = [path.name for path in complete_folders(tmp_path)]
    assert names == ["step_0000001", "step_0000002", "step_9999999", "step_10000000"]  # integers, however many digits
    (tmp_path / "step_0000002" / "COMPLETE").unlink()
    assert [path.name for path in complete_folders(tmp_path)][1] == "step_9999999"
    assert unfinished_folders(tmp_path) == []
    assert numbered(tmp_path / "nothing", "step_") == numbered(tmp_path / "latest", "step_") == []


def test_what_an_attempt_left_is_found_by_its_name(tmp_path: Path) -> None:
    ours = {".incomplete-step_0000002", ".incomplete-old-step_0000001", ".incomplete-12-0-a-host-4711-step_0000003"}
    for name in (*ours, ".incomplete-notes", ".incomplete-step_best", ".incomplete-mine-step_0000003"):
        (tmp_path / name).mkdir()
    assert {path.name for path in unfinished_folders(tmp_path)} == ours


def saves_among_strangers(config: Any, steps: list[int]) -> Any:
    """On a rank: saves of a text for a state; (names after each, newest after each)."""
    from megatron_refine.checkpoint import checkpoints as module

    module.dist_checkpointing.save = lambda state, folder: Path(folder, "payload").write_text("x", "utf-8")
    step, checkpoints = start(config)
    step_names = []
    for number in steps:
        checkpoints.save(module.Progress(number, 0, "rows"), step.updater)
        step_names.append(({p.name for p in checkpoints.root.iterdir()}, checkpoints.latest().name))
    return step_names


def test_saves_leave_strangers_alone_and_never_remove_what_they_wrote(ranks: Any, tmp_path: Path) -> None:
    """The run goes back to step 2 while a step 5 is there, and on beyond it; a link stands where step 7 goes."""
    config = small_config(tmp_path, "checkpoint.keep=1")
    root = tmp_path / "run" / "checkpoints"
    before = strangers(root, written(root, 1))
    written(root, 5)
    (root / "step_0000007").symlink_to("step_best")
    for copy in ("step_1", "step_00000001"):
        shutil.copytree(root / "step_0000001", root / copy)
    before |= {"step_1", "step_00000001"}
    (root / ".incomplete-step_0000006").mkdir()
    found = ranks(1, saves_among_strangers, config=config, steps=[2, 3, 6, 7])[0]
    own = {"latest", "step_0000007"}
    assert found[0] == (before | own | {"step_0000002", "step_0000005"}, "step_0000005")
    assert found[1] == (before | own | {"step_0000003", "step_0000005"}, "step_0000005")
    assert found[2] == (before | own | {"step_0000006"}, "step_0000006")
    assert found[3] == (before | own | {"step_0000007.aside"}, "step_0000007")
    assert (root / "step_0000007.aside").is_symlink() and not (root / "step_0000007").is_symlink()
    assert (root / "latest").read_text(encoding="utf-8") == "step_0000007"
    assert (root / "step_best" / "payload").read_text(encoding="utf-8") == "weights"


def test_a_copy_under_the_number_of_a_step_to_come_is_set_aside(tmp_path: Path) -> None:
    first = written(tmp_path, 1)
    shutil.copytree(first, tmp_path / "step_0000002")
    (tmp_path / "step_0000002.aside").mkdir()
    (tmp_path / "step_0000003").write_text("notes", encoding="utf-8")
    (tmp_path / "step_0000004").mkdir()  # never complete, so never in the way
    (tmp_path / "step_0000005").symlink_to("step_0000001")
    for step in (2, 3, 4, 4, 5):
        written(tmp_path, step)
    assert {p.name for p in tmp_path.iterdir()} == {
        "step_0000001", "step_0000002", "step_0000002.aside", "step_0000002.aside1", "step_0000003",
        "step_0000003.aside", "step_0000004", "step_0000005", "step_0000005.aside", "latest",
    }  # fmt: skip
    assert json.loads((tmp_path / "step_0000002.aside1/manifest.json").read_text("utf-8"))["step"] == 1


def test_a_converted_checkpoint_among_a_runs_own_is_not_passed_over(tmp_path: Path) -> None:
    """It holds weights alone: loading it says so, which is more than to begin anew without a word."""
    folder = written(tmp_path, 3)
    contents = read_manifest(folder)
    manifest.complete(folder, contents | {"step": 0, "weights_only": True})
    assert complete_folders(tmp_path) == [folder]


def test_when_killed_in_removing_a_checkpoint_no_half_of_one_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(tmp_path, 3)

    def killed(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            (path / "payload").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        manifest.discard(folder)
    assert complete_folders(tmp_path) == [] and [p.name for p in unfinished_folders(tmp_path)] == [
        ".incomplete-old-step_0000003"
    ]
    again = written(tmp_path, 3)
    manifest.discard(again)
    assert [p.name for p in tmp_path.iterdir()] == ["latest"]


def test_attempts_are_numbered_among_strangers(tmp_path: Path) -> None:
    logs = tmp_path / "run" / "logs"
    for name in ("attempt_9", "attempt_10", "attempt_backup", "attempt_12.bak", "attempt_"):
        (logs / name).mkdir(parents=True)
    (logs / "attempt_1.tar").write_text("", encoding="utf-8")
    (logs / "attempt_11").symlink_to("attempt_9")
    (logs / "attempt_12").write_text("", encoding="utf-8")
    folder = RunFolder(small_config(tmp_path), 0, 10, str)
    assert folder.attempt == 13 and (logs / "attempt_13/train.log").exists()
    folder.record({"step": 1, "train/loss": 2.0, "time/step": 1.0, "perf/tokens_per_sec": 1.0})
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "2 restarts" in page and "backup" not in page


def test_a_sweep_reads_the_log_of_the_last_attempt(tmp_path: Path) -> None:
    from megatron_refine.scaling.results import _last_error

    for name, line in (("attempt_9", "Error: old"), ("attempt_10", "Error: new"), ("attempt_best", "Error: copy")):
        (tmp_path / "logs" / name).mkdir(parents=True)
        (tmp_path / "logs" / name / "train.log").write_text(line, encoding="utf-8")
    os.utime(tmp_path / "logs/attempt_10/train.log", (0, 0))
    assert _last_error(tmp_path) == "; its last attempt: Error: new"
    assert _last_error(tmp_path / "nothing") == ""


@pytest.mark.parametrize("name", ["manifest.json", "COMPLETE"])
def test_a_checkpoint_that_cannot_be_completed_gets_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    real = manifest.write

    def full(path: Path, text: str) -> None:
        if path.name == name:
            raise OSError(28, "No space left on device")
        real(path, text)

    monkeypatch.setattr(manifest, "write", full)
    with pytest.raises(OSError, match="No space"):
        written(tmp_path, 3)
    assert [p.name for p in tmp_path.iterdir()] == [".incomplete-7-0-host-12-step_0000003"]


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real_sync, real_rename = os.fsync, os.rename

    def fsync(handle: int) -> None:
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        real_sync(handle)

    def rename(self: Path, target: Path) -> Path:
        events.append(f"rename {target.name}")
        real_rename(self, target)
        return target

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    written(tmp_path, 3)
    folder = ".incomplete-7-0-host-12-step_0000003"
    named = events.index("rename step_0000003")
    before, after = events[:named], events[named + 1 :]
    temporary = [event for event in before if ".COMPLETE" in event or ".manifest" in event]
    assert {"sync payload", f"sync {folder}"} <= set(before) and len(temporary) == 2, events
    assert before[-1] == f"sync {folder}" and after[0] == f"sync {tmp_path.name}", events
    (tmp_path / "other/hf").mkdir(parents=True)
    (tmp_path / "other/hf/config.json").write_text("{}", encoding="utf-8")
    manifest.hashes(tmp_path / "other")
    assert {"sync config.json", "sync hf"} <= set(events), events  # the names in a folder below, too


def resealed(folder: Path, text: str) -> None:
    import hashlib

    (folder / "manifest.json").write_text(text, encoding="utf-8")
    (folder / "COMPLETE").write_text(hashlib.sha256(text.encode()).hexdigest(), encoding="utf-8")


def test_a_run_stands_for_its_newest_complete_checkpoint(tmp_path: Path) -> None:
    root = tmp_path / "run/checkpoints"
    for step in (9, 9_999_999, 10_000_000, 10_000_001):
        folder = written(root, step)
        contents = read_manifest(folder) | {"model": small_config(tmp_path).model.model_dump()}
        resealed(folder, json.dumps(contents))
    (folder / "COMPLETE").unlink()
    for path in (root, root.parent):
        assert find(path).folder == root / "step_10000000"


WHOLE: dict[str, Any] = {"step": 3, "model": {}, "layout": [1, 1, 1], "files": {}}


@pytest.mark.parametrize(
    "contents, words",
    [
        ([], "is no checkpoint's manifest"),
        (WHOLE | {"step": "3"}, "is no checkpoint's manifest"),
        *[({k: v for k, v in WHOLE.items() if k != key}, "is no checkpoint's manifest") for key in WHOLE],
        (WHOLE | {"files": {"payload": 3}}, "payload: no size or sha256"),
        (WHOLE | {"files": {"payload": {"size": 3}}}, "payload: no size or sha256"),
    ],
)
def test_a_manifest_that_says_nothing_sensible(tmp_path: Path, contents: Any, words: str) -> None:
    folder = written(tmp_path, 3)
    resealed(folder, json.dumps(contents))
    with pytest.raises(CheckpointError, match=rf"manifest\.json: .*{words}|manifest\.json: {words}"):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside"])
def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path, name: str) -> None:
    folder = written(tmp_path, 3)
    (tmp_path / "outside").write_text("weights", encoding="utf-8")
    contents = read_manifest(folder)
    contents["files"][name] = contents["files"]["payload"]
    with pytest.raises(DamagedError, match="missing; delete"):
        manifest.check_files(folder, contents["files"])


@pytest.mark.parametrize("target", ["file", "folder"])
def test_a_checkpoint_with_a_link_in_it_is_refused(tmp_path: Path, target: str) -> None:
    """hf/ is copied into every checkpoint of a run that starts from it: so would be what a link in it names."""
    folder = written(tmp_path, 3)
    (tmp_path / "file").write_text("secret", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "key").write_text("secret", encoding="utf-8")
    (folder / "hf").symlink_to(tmp_path / "folder") if target == "folder" else (folder / "x").symlink_to("../file")
    with pytest.raises(CheckpointError, match=r"step_0000003/(hf|x): a link, which may lead out of the checkpoint"):
        manifest.check_files(folder, read_manifest(folder)["files"])


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"\xff\xfe"], ids=["empty", "zeros", "no text"])
@pytest.mark.parametrize("name", ["manifest.json", "COMPLETE"])
def test_a_manifest_that_a_power_cut_tore(tmp_path: Path, name: str, content: bytes) -> None:
    for step in (1, 2):
        written(tmp_path, step)
    folder = written(tmp_path, 3)
    (folder / name).write_bytes(content)
    assert complete_folders(tmp_path)[-1] == folder
    with pytest.raises(DamagedError, match=rf"{folder}/.*damaged.*; delete {folder} to go back to step_0000002"):
        read_manifest(folder)


def test_a_model_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    whole = {"family": "delta_net", "hidden_size": 0}
    for section, words in (({"family": "gpt"}, "model.family is 'gpt'; known are delta_net"), (whole, "hidden_size")):
        with pytest.raises(CheckpointError, match=words):
            manifest.model_in(tmp_path, {"model": section})


def test_a_conversion_beside_checkpoints_is_no_runs(tmp_path: Path) -> None:
    """`checkpoints/delta_net` in a folder with a tokenizer of its own: that one is not the model's."""
    folder = written(tmp_path / "checkpoints", 3)
    resealed(folder, json.dumps(read_manifest(folder) | {"model": small_config(tmp_path).model.model_dump()}))
    assert find(folder, "--model").run == tmp_path
    other = folder.rename(tmp_path / "checkpoints/best")  # a copy of the run's under another name is still the run's
    assert find(other, "--model").run == tmp_path
    resealed(other, json.dumps(read_manifest(other) | {"weights_only": True}))
    assert find(other, "--model").run is None
