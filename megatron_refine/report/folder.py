"""The run folder and the screen: config.yaml, metrics.jsonl, samples.json, logs/attempt_<n>/train.log, report.html. The
tokenizer in it is kept by data/tokenizer.py."""

import contextlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_refine.config import Config
from megatron_refine.files import Appended, TornError, numbered, read_json, read_rows, write, write_json
from megatron_refine.report import history
from megatron_refine.report.metrics import METRICS, MetricsLog, Row, read
from megatron_refine.report.screen import comparison, eval_line, step_line
from megatron_refine.report.summary import is_step, milestones, sharpened, step_times
from megatron_refine.report.tracking import Tracking

PROGRESS = "progress.json"
RECENT = 20  # steps whose pace tells the time left


class RunFolder:
    """The run folder as the main rank writes it. Each attempt has its own logs; metrics go on in one file."""

    def __init__(self, config: Config, done_steps: int, total_steps: int, show: Callable[[str], None]):
        """Begin an attempt. Raises OSError where the folder cannot be written."""
        self.config, self.path, self.total_steps, self.show = config, Path(config.run.dir), total_steps, show
        self.attempt, self._logs = _new_attempt(self.path / "logs")
        self._log = Appended(self._logs / "train.log")
        write(self.path / "config.yaml", config.to_yaml())
        self.metrics = MetricsLog(self.path / METRICS)
        self.metrics.truncate_after(done_steps or -1)  # a run without a checkpoint begins anew, with step 0
        self._ends: deque[float] = deque(maxlen=RECENT)  # unix times of the last steps
        self.predictions = Predictions(self.path / "predictions.jsonl", done_steps)
        self._tracking = Tracking(config, self.say) if config.run.wandb != "off" else None

    def say(self, line: str) -> None:
        """Write a line on the screen and in the attempt's log."""
        self.show(line)
        self.note(line)

    def note(self, line: str) -> None:
        """Write a line in the attempt's log alone."""
        self._log.write(line + "\n")

    def record(self, row: Row) -> None:
        """The metrics of a step or an evaluation: file, screen, wandb."""
        row = row | {"attempt": self.attempt, "wall": time.time()}
        self.metrics.append(row)
        if is_step(row):
            self._ends.append(row["wall"])
            steps, each = self.total_steps - row["step"], (self._ends[-1] - self._ends[0]) / max(1, len(self._ends) - 1)
            self.say(step_line(row, self.total_steps, steps * each if len(self._ends) > 1 else None))
        if "eval/ntp_loss" in row:
            self.say(eval_line(row))
        if self._tracking:
            self._tracking.log(row)

    def keep_attempt(self, step: int, ranks: int, changed: Mapping[str, Any]) -> None:
        """Write beside the log what the attempt is: configuration, step, layout, versions, and what `changed`."""
        history.keep(self._logs, self.config, step, ranks, changed)

    def keep_progress(self, progress: Mapping[str, Any]) -> None:
        """Write where the run stands, for `read_progress`. Atomic."""
        write_json(self.path / PROGRESS, dict(progress))

    def save_samples(self, samples: Mapping[str, Any]) -> None:
        """Write selected positions and rollouts of a held-out sequence, for the report."""
        write_json(self.path / "samples.json", samples, indent=None)

    def finish(self) -> None:
        """The comparison of before and after on the screen, and the report."""
        from megatron_refine.report.html import write_report  # late: matplotlib takes a second

        rows = read(self.metrics.path)
        baseline = read(Path(self.config.run.baseline) / METRICS) if self.config.run.baseline else []
        framed = milestones(rows, baseline)
        self.say(comparison(framed, step_times(rows)))
        if line := sharpened(framed):
            self.say(line)
        self.say(f"report {write_report(self.path, baseline)}")

    def close(self, code: int) -> None:
        """End the attempt, whatever ended it, by the command's exit code."""
        if self._tracking:
            self._tracking.finish(code)


class Predictions:
    """Answers of test-time training, a JSON object each, with the step of its batch."""

    def __init__(self, path: Path, done_steps: int):
        """Drop the rows after `done_steps` and a torn last line: what a resumed run will write again."""
        self.path = path
        kept = [row for row in self.read() if row["step"] <= done_steps]
        if kept or path.exists():
            write(path, "".join(map(_line, kept)))

    def append(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        file = Appended(self.path)
        file.write("".join(_line({"step": step} | dict(row)) for row in rows))
        file.sync()  # what comes next says that they were answered
        file.close()

    def read(self) -> list[dict[str, Any]]:
        """Read all rows. Raises OSError, and TornError where a line but the last is damaged."""
        return read_rows(self.path)


def read_progress(run_dir: Path) -> dict[str, Any] | None:
    """Read what `keep_progress` kept last; None in a new run. Raises OSError, and TornError where it is damaged."""
    path = run_dir / PROGRESS
    if not path.exists():
        return None
    kept: dict[str, Any] = read_json(path)
    if not isinstance(kept, dict) or kept.keys() != {"step", "consumed_samples", "data"}:
        raise TornError(f"{path}: damaged: {str(kept)[:80]} is not a run's progress; delete it or restore it")
    return kept


def _new_attempt(logs: Path) -> tuple[int, Path]:
    """Make the next attempt's folder, after the others and where nothing is in the way. Return number and folder."""
    number = max((number for number, _ in numbered(logs, "attempt_")), default=0) + 1
    logs.mkdir(parents=True, exist_ok=True)
    while True:
        with contextlib.suppress(FileExistsError):
            (logs / f"attempt_{number}").mkdir()
            return number, logs / f"attempt_{number}"
        number += 1


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row) + "\n"
