"""Saves that fail: on one rank, on a full disk, under another attempt. The earlier checkpoint stays."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_refine.config import Config
from tests.runs import FAILURES, failing, small_disk
from tests.test_checkpoint import config_at, part, saved, start

__all__ = ["saved"]  # a fixture
LOCAL = ("prepare", "hash", "complete")  # phases after which the ranks agree whether one of them failed


def failed_saves(config: Config) -> Any:
    """On a rank: a save that fails in each phase, then one that does not. Errors and the newest step after each."""
    from megatron_refine.checkpoint.checkpoints import Progress
    from megatron_refine.errors import CheckpointError

    step, checkpoints = start(config)
    step(part(0, step), 0, refine=False)
    found = []
    for phase in LOCAL:
        with failing(phase), pytest.raises(CheckpointError) as error:
            checkpoints.save(Progress(4, 16, "rows"), step.updater)
        found.append((str(error.value), newest(checkpoints, step)))
    checkpoints.save(Progress(6, 24, "rows"), step.updater)
    return found, newest(checkpoints, step)


def newest(checkpoints: Any, step: Any) -> int:
    return checkpoints.load(checkpoints.latest(), step.updater).step


def test_a_rank_that_fails_alone_in_a_save_fails_it_on_all(ranks: Any, tmp_path: Path, saved: Any) -> None:
    """The earlier checkpoint stays, and the next save succeeds. (Failures inside Megatron: test_bad_input.py.)"""
    config = config_at("tp2", tmp_path)
    shutil.copytree(saved[0].parent, Path(config.run.dir) / "checkpoints")
    (found, last), other = ranks(2, failed_saves, config=config)
    assert other == (found, last), "the ranks disagree"
    for phase, (message, step) in zip(LOCAL, found, strict=True):
        reason = f"{phase} failed: OSError: .*No space left on device; earlier checkpoints are intact"
        assert re.fullmatch(rf".*step_0000004: {reason} \(rank {FAILURES[phase][0]}\)", message)
        assert step == 2, phase
    assert last == 6


def taken_over_in_a_save(config: Config) -> str:
    """On a rank: the kind of error where files vanish in a save because another attempt has taken the folder."""
    from megatron_refine.checkpoint.ownership import Ownership, attempt_token
    from megatron_refine.errors import CheckpointError

    step, checkpoints = start(config)
    run = checkpoints.root.parent
    run.mkdir()
    checkpoints.owner = Ownership(run, attempt_token())
    checkpoints.owner.claim()

    def removed() -> None:
        Ownership(run, attempt_token() | {"pid": 1}).claim()
        raise FileNotFoundError(2, "No such file or directory")

    with pytest.raises(CheckpointError) as error:
        checkpoints._collective("save", checkpoints.root, removed)
    return f"{type(error.value).__name__}: {error.value}"


def test_files_that_another_attempt_removed_are_no_failure_of_the_disk(ranks: Any, tmp_path: Path) -> None:
    found = ranks(1, taken_over_in_a_save, config=config_at("tp1", tmp_path))[0]
    assert found.startswith("FencedError: ") and "process 1 on" in found and "has taken over" in found


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    with small_disk(tmp_path / "disk", "8m") as folder:
        yield folder


def save_on_a_full_disk(config: Config) -> tuple[str, int]:
    """On a rank: the error, and the newest step."""
    import torch.distributed as dist

    from megatron_refine.checkpoint.checkpoints import Progress
    from megatron_refine.errors import CheckpointError

    step, checkpoints = start(config)
    step(part(0, step), 0, refine=False)
    if step.ranks.is_main:
        (checkpoints.root / "filler").write_bytes(bytes(shutil.disk_usage(checkpoints.root).free))
    dist.barrier()
    with pytest.raises(CheckpointError) as error:
        checkpoints.save(Progress(4, 16, "rows"), step.updater)
    return str(error.value), newest(checkpoints, step)


def test_a_full_disk_loses_no_checkpoint(ranks: Any, disk: Path, saved: Any) -> None:
    config = config_at("tp2", disk)
    shutil.copytree(saved[0].parent, Path(config.run.dir) / "checkpoints")
    for message, step in ranks(2, save_on_a_full_disk, config=config):
        assert re.search(r"step_0000004: disk full: .*, 0 MiB are free; earlier checkpoints are intact", message)
        assert step == 2
