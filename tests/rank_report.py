"""What the ranks of a test left behind: their results, or an error that says which rank failed first, and why."""

import pickle
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

TAIL = 6000  # characters of a rank's output that a failure shows


class RankError(RuntimeError):
    """A rank raised, died or hung."""


@dataclass(frozen=True)
class End:
    """How a rank ended: by itself, at the deadline, or stopped because another rank had failed."""

    kind: Literal["exited", "hung", "stopped"]
    code: int | None = None  # of those that exited; negative: a signal


@dataclass(frozen=True)
class Failure:
    rank: int
    order: tuple[int, float]  # the lowest is the first to fail
    cause: str
    details: str = ""


def collect(folder: Path, name: str, timeout: float, ends: list[End]) -> list[Any]:
    """The results by rank, from `<rank>.result` in `folder`. Raises RankError where a rank has none."""
    outcomes = [_outcome(folder, rank) for rank in range(len(ends))]
    if all(end == End("exited", 0) and done for end, (done, _) in zip(ends, outcomes, strict=True)):
        return [value for _, value in outcomes]
    failures = [_failure(folder, rank, end, outcomes[rank]) for rank, end in enumerate(ends)]
    found = sorted((f for f in failures if f), key=lambda f: f.order)
    raise RankError("\n".join([_headline(found, name, timeout, ends), *_sections(found), *_output(folder, len(ends))]))


def _outcome(folder: Path, rank: int) -> tuple[bool, Any]:
    path = folder / f"{rank}.result"
    return pickle.loads(path.read_bytes()) if path.exists() else (False, None)


def _failure(folder: Path, rank: int, end: End, outcome: tuple[bool, Any]) -> Failure | None:
    done, value = outcome
    if end.kind == "exited":
        if end.code == 0 and done:
            return None
        if value is not None and not done:
            when, cause, trace = value
            return Failure(rank, (1, when), cause, trace)
        return Failure(rank, (0, 0.0), _death(end.code or 0))  # before those whose connection it broke
    stack = folder / f"{rank}.stack"
    cause = {"hung": "still running", "stopped": "stopped, it had not noticed"}[end.kind]
    cause += ", its function done" if done else ""
    return Failure(rank, (2 + done, 0.0), cause, stack.read_text(encoding="utf-8") if stack.exists() else "")


def _death(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"left with exit status {code} and no result"


def _headline(failures: list[Failure], name: str, timeout: float, ends: list[End]) -> str:
    first = failures[0]
    if first.order[0] < 2:
        return f"{name}: rank {first.rank} of {len(ends)} failed first: {first.cause}"
    late = [f.rank for f in failures if f.order[0] == first.order[0]]
    return f"{name}: deadline of {timeout:g} s passed, still running: rank {', '.join(map(str, late))} of {len(ends)}"


def _sections(failures: list[Failure]) -> list[str]:
    """The first failure in full, with the stacks of the hanging ones; one line for each of the others."""
    first, *others = failures
    lines = [f"--- rank {first.rank} ---\n{first.details.rstrip()}"] if first.details else []
    for failure in others:
        lines.append(f"--- rank {failure.rank}: {failure.cause} ---")
        if failure.order[0] >= 2:
            lines.append(failure.details.rstrip())
    return lines


def _output(folder: Path, world_size: int) -> list[str]:
    lines = []
    for rank in range(world_size):
        path = folder / f"{rank}.log"
        text = path.read_text(errors="replace", encoding="utf-8")[-TAIL:].rstrip() if path.exists() else ""
        if text:
            lines.append(f"--- output of rank {rank} ---\n{text}")
    return lines
