"""Checkpoints that are written beside the training: of the state when the save began, complete or not there at all."""

import multiprocessing
import os
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megatron_refine.config import Config
from tests import runs
from tests.lanes import short
from tests.parity import small_config
from tests.runs import TP2, small_disk
from tests.test_checkpoint import part, plain, start
from tests.test_saves import newest
from tests.zygote import Zygote

ASYNC = "checkpoint.async=true"
SAID = re.compile(r"checkpoint .*step_000000([246]) \(written in [0-9.]+s beside the training\)")


def configured(folder: Path, *overrides: str, model: str = "delta_net") -> Config:
    folder.mkdir(exist_ok=True)
    return small_config(folder, "train.micro_batch_size=1", *overrides, model=model)


def one_step(config: Config) -> Any:
    """On a rank: (progress, step, checkpoints) after a step."""
    from megatron_refine.checkpoint.checkpoints import Progress

    step, checkpoints = start(config)
    step(part(0, step), 0, refine=True)
    return Progress(1, 4, "rows"), step, checkpoints


def held(folder: str, seconds: float = 60.0) -> Any:
    """Keep the writers in `folder` from writing until it has a file `go`. They are forked after this."""
    import megatron_refine.checkpoint.pending as pending

    original = pending._write

    def write(sender: Any, *arguments: Any) -> None:
        end = time.monotonic() + seconds
        while not Path(folder, "go").exists() and time.monotonic() < end:
            time.sleep(0.01)
        original(sender, *arguments)

    pending._write = write


def steps_while_it_is_written(config: Config) -> Any:
    """On a rank: a save that is held until two further steps are done. The folders found meanwhile, and at last."""
    progress, step, checkpoints = one_step(config)
    held(config.run.dir)
    assert checkpoints.save(progress, step.updater) is None
    found = []
    for i in (1, 2):
        step(part(i, step), i, refine=True)
        found.append((checkpoints.settle(wait=False), checkpoints.latest()))
    dist.barrier()
    (Path(config.run.dir) / "go").touch()
    final = checkpoints.settle()
    return found, final, checkpoints.settle(), step(part(3, step), 3, refine=False)


def saved_at_once(config: Config) -> Any:
    """On a rank: the same without waiting for anything."""
    progress, step, checkpoints = one_step(config)
    checkpoints.save(progress, step.updater)
    return [step(part(i, step), i, refine=i < 3) for i in (1, 2, 3)][-1]


@pytest.mark.parametrize(
    ("world", "overrides"),
    short([(2, TP2), (2, ["train.precision=bf16"]), (1, [])], lambda world, overrides: world == 1),
)
def test_it_is_the_state_when_the_save_began(ranks: Zygote, tmp_path: Path, world: int, overrides: list[str]) -> None:
    """Bit for bit, though two steps change weights and moments before a byte is written. The training is the same."""
    first, second = (configured(tmp_path / name, *overrides) for name in ("sync", "async"))
    second = second.model_copy(update={"checkpoint": configured(tmp_path / "async", *overrides, ASYNC).checkpoint})
    expected = ranks(world, saved_at_once, config=first)[0]
    for found, final, again, metrics in ranks(world, steps_while_it_is_written, config=second):
        assert found == [(None, None)] * 2 and again is None
        assert final == Path(second.run.dir) / "checkpoints/step_0000001"
        assert metrics["train/ntp_loss"] == expected["train/ntp_loss"]
    tensors = [ranks(1, plain, folder=Path(c.run.dir) / "checkpoints/step_0000001")[0] for c in (first, second)]
    assert tensors[0].keys() == tensors[1].keys()
    assert [name for name in tensors[0] if not tensors[0][name].equal(tensors[1][name])] == []


def failed_writers(config: Config) -> Any:
    """On a rank: a writer that is killed, a disk that gets full; what is said, and that the run can save again."""
    from megatron_refine.checkpoint.checkpoints import Progress
    from megatron_refine.errors import CheckpointError

    progress, step, checkpoints = one_step(config)
    checkpoints.save(progress, step.updater)
    checkpoints.settle()
    held(config.run.dir)
    checkpoints.save(Progress(2, 8, "rows"), step.updater)
    if step.ranks.rank == 1:
        os.kill(checkpoints._pending._process.pid, signal.SIGKILL)
    (Path(config.run.dir) / "go").touch()
    said = []
    with pytest.raises(CheckpointError) as error:
        checkpoints.settle()
    said.append(str(error.value))
    (Path(config.run.dir) / "go").unlink(missing_ok=True)
    dist.barrier()
    checkpoints.save(Progress(3, 12, "rows"), step.updater)
    if step.ranks.is_main:
        (Path(config.run.dir) / "filler").write_bytes(bytes(shutil.disk_usage(config.run.dir).free))
    dist.barrier()
    (Path(config.run.dir) / "go").touch()
    with pytest.raises(CheckpointError) as error:
        checkpoints.settle()
    said.append(str(error.value))
    dist.barrier()
    (Path(config.run.dir) / "filler").unlink(missing_ok=True)
    checkpoints.save(Progress(4, 16, "rows"), step.updater)
    checkpoints.save(Progress(5, 20, "rows"), step.updater)  # waits for the one before
    first = checkpoints.latest()
    checkpoints.settle()
    return said, first, newest(checkpoints, step)


def test_a_writer_that_fails_ends_the_save_on_all_ranks(ranks: Zygote, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "24m") as disk:
        config = configured(disk, *TP2, ASYNC)
        ((killed, full), first, last), (others, *rest) = ranks(2, failed_writers, config=config)
        assert others[0] == killed and "save failed: on another rank" in others[1] and rest == [first, last]
        assert re.search(r"step_0000002: save failed: the process that wrote it ended with code -9; earlier", killed)
        assert re.search(r"step_0000003: save failed: .*No space left on device", full)
        assert first == Path(config.run.dir) / "checkpoints/step_0000004" and last == 5


def counted_by_writers(folder: Path) -> list[list[str]]:
    """On a rank: the files that the writing process of each of three ranks counts."""
    from megatron_refine.checkpoint.pending import _write

    found = []
    for rank in (0, 1, 10):
        receiver, sender = multiprocessing.Pipe(duplex=False)
        _write(sender, None, (), {}, folder, rank)
        found.append(sorted(receiver.recv()))
    return found


def test_a_writer_counts_no_file_that_another_may_still_write(ranks: Zygote, tmp_path: Path) -> None:
    """And the first one what the model came with; the main rank counts the rest when all are done."""
    (tmp_path / "hf").mkdir()
    for name in ("__0_0.distcp", "__1_0.distcp", "__10_0.distcp", "hf/config.json", "common.pt"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    expected = [["__0_0.distcp", "hf/config.json"], ["__1_0.distcp"], ["__10_0.distcp"]]
    assert ranks(1, counted_by_writers, folder=tmp_path) == [expected]


def left_to_write(config: Config) -> bool:
    """On a rank: whether a checkpoint that the second one still writes stays pending."""
    step, checkpoints = start(config)
    pending = checkpoints._pending = SimpleNamespace(folder=checkpoints.root, running=lambda: step.ranks.rank == 1)
    return checkpoints.settle(wait=False) is None and checkpoints._pending is pending


def test_no_rank_waits_between_steps_for_another_that_writes(ranks: Zygote, tmp_path: Path) -> None:
    assert ranks(2, left_to_write, config=configured(tmp_path)) == [True, True]


@pytest.mark.slow
def test_a_run_that_saves_beside_its_steps(ranks: Zygote, tmp_path: Path) -> None:
    """Its metrics are those of one that waits; the screen says when each checkpoint is complete. A signal is answered
    when the last checkpoint is, and the next attempt goes on from it."""
    sections = {"train": {"steps": 6, "micro_batch_size": 2}, "checkpoint": {"every": 2, "keep": 3}}
    found = {}
    for name, words in (("sync", []), ("async", [ASYNC]), ("stopped", [ASYNC, "checkpoint.every=1"])):
        (tmp_path / name).mkdir()
        line = ["--config", str(runs.write_config(tmp_path / name, tmp_path / "data", **sections)), *runs.TP2, *words]
        if name == "stopped":
            ends = ranks(2, runs.command, arguments=line, fault=runs.Fault(3, signal.SIGTERM, rank=1))
            assert [end.code for end in ends] == [75, 75], ends
            assert (tmp_path / name / "run/checkpoints/step_0000003/COMPLETE").exists()
        ends = ranks(2, runs.command, arguments=line)
        assert [end.code for end in ends] == [0, 0], ends
        found[name] = runs.rows(tmp_path / name)
        names = {path.name for path in (tmp_path / name / "run/checkpoints").iterdir()}
        steps = (4, 5, 6) if name == "stopped" else (2, 4, 6)
        assert names == {"latest", *(f"step_{step:07d}" for step in steps)}
        if name == "async":
            said = SAID.findall(ends[0].out)
    assert found["sync"] == found["async"] == found["stopped"]
    assert said == ["2", "4", "6"]
