"""What the tests of whole runs share: their configuration file, the training command in a rank, ways to break it."""

import argparse
import ast
import json
import os
import resource
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

MODEL = {
    "family": "delta_net", "vocab_size": 512, "hidden_size": 64, "num_layers": 2, "num_heads": 4,
    "intermediate_size": 128, "init_std": 0.05,
}  # fmt: skip
TREE: dict[str, dict[str, Any]] = {
    "run": {"timeout_minutes": 5.0},
    "model": MODEL,
    "data": {
        "paths": [argparse.__file__, ast.__file__], "valid_paths": [textwrap.__file__],
        "seq_length": 192, "split_documents": True,
    },
    "optimizer": {"lr": 1e-3},
    "train": {"steps": 6, "global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32"},
    "refine": {"num_chunks": 4, "num_rollouts": 2, "rollout_len": 5, "reward": "tests.runs:reward"},
    "eval": {"sequences": 0},
}  # fmt: skip
TP2 = ("parallel.tp=2", "parallel.sp=true")
# keys of a row that differ from attempt to attempt; weights are numbered anew in each
VOLATILE = ("time/", "perf/", "attempt", "wall")


@dataclass(frozen=True)
class Fault:
    """What the reward does in the REFINE steps `step` to `until`: a signal to the own process on one rank, or NaN."""

    step: int  # 1 is the first
    signal: int = 0  # 0: NaN instead
    rank: int = 0
    until: int = 1 << 30


@dataclass(frozen=True)
class End:
    """How the command ended on a rank."""

    code: int
    out: str
    err: str


_fault: Fault | None = None
_step = 0  # of the exploration under way


def reward(tokens: Any, truth: Any, h_pred: Any, h_true: Any) -> Any:
    """`cosine`, unless this is the time of the fault: between rollout and update."""
    from megatron_refine.step.reward import cosine

    global _fault
    rewards = cosine(tokens, truth, h_pred, h_true)
    if not _fault or not _fault.step <= _step <= _fault.until:
        return rewards
    if not _fault.signal:
        return rewards * float("nan")
    if int(os.environ["RANK"]) == _fault.rank:
        number, _fault = _fault.signal, None  # in one micro-batch alone: a second Ctrl-C would end the run at once
        os.kill(os.getpid(), number)
    return rewards


def write_config(folder: Path, cache_dir: Path, **sections: dict[str, Any]) -> Path:
    """A configuration file of the small run in `folder/run`; `sections` add to those of TREE."""
    own: dict[str, dict[str, Any]] = {"run": {"dir": str(folder / "run")}, "data": {"cache_dir": str(cache_dir)}}
    names = TREE.keys() | sections.keys()
    tree = {name: TREE.get(name, {}) | own.get(name, {}) | sections.get(name, {}) for name in names}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def command(
    arguments: list[str], fault: Fault | None = None, record: Path | None = None, saves: bool = True, broken: str = "",
    plots: bool = False,
) -> End:  # fmt: skip
    """On a rank: the training command. Its draws are appended to the file `record`, by rank 0.

    Without `saves` no checkpoint is written, without `plots` the report has empty figures: a process's first ones take
    seconds. `broken` is one of FAILURES.
    """
    global _fault
    from megatron_refine.report import figures
    from megatron_refine.run.session import Session
    from megatron_refine.step.refine import RefineStep
    from megatron_refine.train import main

    _fault = fault
    if not plots:
        figures.draw = lambda name, paint, widths=(1,): f"<svg id='{name}'></svg>"
    RefineStep.explore_wave = _observed(RefineStep.explore_wave, record)  # type: ignore[method-assign]
    save = Session.save if saves else lambda self: None
    Session.save = failing(broken)(save) if broken else save  # type: ignore[method-assign]
    with _captured() as texts:
        code = main(arguments)
    return End(code, *texts)


def _observed(explore_wave: Callable[..., Any], record: Path | None) -> Callable[..., Any]:
    """`explore_wave` that notes the step and writes what it drew."""
    from megatron_refine.eval.heldout import COUNTER

    def observed(self: Any, batches: Any, step: int, *args: Any, **kwargs: Any) -> Any:
        global _step
        _step = step + 1 if step < COUNTER else 0
        found = explore_wave(self, batches, step, *args, **kwargs)
        for explored, _ in found if record and _step and os.environ["RANK"] == "0" else ():
            e = explored.experience
            drawn = {"positions": e.positions, "tokens": e.tokens, "rewards": explored.rewards}
            with record.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": _step} | {k: v.tolist() for k, v in drawn.items()}) + "\n")
        return found

    return observed


@contextmanager
def _captured() -> Iterator[list[str]]:
    """What the process writes on its screen, in the end: [stdout, stderr]. The rank's log has it too."""
    texts: list[str] = []
    files, kept = [tempfile.TemporaryFile() for _ in (1, 2)], [os.dup(fd) for fd in (1, 2)]
    for fd, file in zip((1, 2), files, strict=True):
        os.dup2(file.fileno(), fd)
    try:
        yield texts
    finally:
        print(end="", flush=True)
        for fd, file, old in zip((1, 2), files, kept, strict=True):
            os.dup2(old, fd)
            file.seek(0)
            texts.append(file.read().decode())
            os.write(fd, texts[-1].encode())


def first_line(end: End) -> str:
    """What the run says of itself when it has begun; lines on its input come before."""
    return next(line for line in end.out.splitlines() if line.startswith("run "))


# what fails in a save, on one rank alone: (rank, the function that raises there; "": its files get too large)
FAILURES = {
    "prepare": (0, "megatron_refine.checkpoint.checkpoints.Checkpoints._clear"),
    "gather": (1, "megatron_refine.platform.megatron.streams.rng_state"),
    "format file": (0, "megatron.core.dist_checkpointing.serialization.save_config"),
    "weights": (1, ""),
    "hash": (1, "megatron_refine.checkpoint.checkpoints.hashes"),
    "complete": (0, "megatron_refine.checkpoint.checkpoints.seal"),
}
FULL = OSError(28, "No space left on device")


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of `size` (as mount reads it) at `folder`, which is made. Skips the test where none can be."""
    import subprocess

    import pytest

    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root alone, and not in every container")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def failing(phase: str) -> Iterator[None]:
    """On a rank: `phase` fails if it is the rank for it."""
    rank, target = FAILURES[phase]
    if rank != int(os.environ["RANK"]):
        yield
    elif target:
        with mock.patch(target, side_effect=FULL):
            yield
    else:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        yield
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def rows(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run in `folder/run`, without what differs from attempt to attempt."""
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(VOLATILE)} for line in lines]


def draws(record: Path) -> list[dict[str, Any]]:
    """Positions, rollout tokens and rewards of each micro-batch, in order."""
    return [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
