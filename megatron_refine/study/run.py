"""The runs of a study: texts and weights of each base, its training, then the arms. What has finished stays."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_refine.checkpoint.manifest import last_step
from megatron_refine.checkpoint.source import CHECKPOINTS
from megatron_refine.estimate.flops import total_steps
from megatron_refine.report import metrics
from megatron_refine.report.metrics import Row
from megatron_refine.report.summary import is_evaluation
from megatron_refine.study.documents import Language, write_held_out, write_texts, write_tokenizer
from megatron_refine.study.plan import Plan, Run, bases, continuations
from megatron_refine.study.start import write_start

Train = Callable[[list[str], Path], int]  # words of the command `train`, a log -> its exit code


class StudyError(RuntimeError):
    """A run of the study that failed."""


def train(words: list[str], log: Path) -> int:
    """Train in a process of its own."""
    with log.open("ab") as file:
        command = [sys.executable, "-m", "megatron_refine", "train", *words]
        return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT).returncode


def run_all(plan: Plan, jobs: int, say: Callable[[str], None], train: Train = train) -> None:
    """Run what has not finished, `jobs` runs at a time: bases first. Raises StudyError naming a run that failed."""
    for stage in (list(bases(plan)), list(continuations(plan))):
        _run_stage(plan, stage, jobs, say, train)


def evaluations(plan: Plan, run: Run) -> tuple[Row, Row] | None:
    """Return the first and the last evaluation of a finished run; None of one that has not finished."""
    rows = [row for row in metrics.read(run.folder / metrics.METRICS) if is_evaluation(row)]
    return (rows[0], rows[-1]) if rows and rows[-1]["step"] >= total_steps(run.config(plan)) else None


def finished(plan: Plan) -> list[tuple[Run, Row, Row]]:
    """Return the runs that have finished, with their first and last evaluations."""
    found = [(run, evaluations(plan, run)) for run in (*bases(plan), *continuations(plan))]
    return [(run, *both) for run, both in found if both]


def _run_stage(plan: Plan, runs: Sequence[Run], jobs: int, say: Callable[[str], None], train: Train) -> None:
    left = _left(plan, runs)
    done = len(runs) - len(left)
    kind = "arms" if runs[0].arm else "bases"
    if done:
        say(f"{kind}: {done} of {len(runs)} finished before")
    for run in left:  # one after the other: runs share their texts
        _prepare(plan, run)
    with ThreadPoolExecutor(jobs) as pool:
        for run, code in zip(left, pool.map(lambda run: _one(plan, run, train), left), strict=True):
            done += 1
            say(f"{kind} {done}/{len(runs)}: {run.folder}")
            if code or not evaluations(plan, run):
                pool.shutdown(wait=True, cancel_futures=True)
                raise StudyError(f"{run.folder}: ended with code {code}; see {_log(run)}, then start again: it goes on")


def _left(plan: Plan, runs: Sequence[Run]) -> list[Run]:
    """Return those that are still to be run: a base also where arms are to go on from a checkpoint that it lacks."""
    left = [run for run in runs if not evaluations(plan, run)]
    if runs[0].arm:
        return left
    waiting = {run.home for run in continuations(plan) if not evaluations(plan, run)}
    lacking = [run for run in runs if last_step(run.folder / CHECKPOINTS) < total_steps(run.config(plan))]
    return [run for run in runs if run in left or (run in lacking and run.home in waiting)]


def _one(plan: Plan, run: Run, train: Train) -> int:
    files = [word for file in plan.config for word in ("--config", file)]
    return train([*files, *run.overrides(plan)], _log(run))


def _log(run: Run) -> Path:
    return run.folder.with_name(run.folder.name + ".log")


def _prepare(plan: Plan, run: Run) -> None:
    """Write what the run reads, unless it is there: a text for each sequence, so that none is read twice."""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    config, language = run.config(plan), Language(plan.documents, run.base)
    if not run.texts.exists():
        number = config.train.steps * config.train.global_batch_size
        write_texts(language, run.texts, number, f"{run.base} {run.texts.name}")
    if not run.arm:
        write_tokenizer(plan.documents, run.home / "tokenizer.json")
        write_held_out(language, run.held_out("texts"), run.held_out("prompts"), f"{run.base} held out")
        write_start(run.home / "start", config.model, run.base)
