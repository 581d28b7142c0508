"""Summaries of a run's rows. Pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from megatron_refine.report.metrics import Row


@dataclass(frozen=True)
class StepTimes:
    """Seconds of each step, by kind."""

    ntp: Sequence[float]
    refine: Sequence[float]

    @property
    def ratio(self) -> float | None:
        """Median REFINE step / median NTP step; None without steps of both kinds."""
        return median(self.refine) / median(self.ntp) if self.ntp and self.refine else None


def is_refine(row: Row) -> bool:
    """Tell whether the row is of a REFINE step: these alone have rollouts."""
    return any(key.startswith("rollout/") for key in row)


def is_step(row: Row) -> bool:
    """Tell whether the row is of a training step, not of an evaluation before the first one."""
    return "train/loss" in row


def is_evaluation(row: Row) -> bool:
    """Tell whether the model was evaluated after the row's step."""
    return "eval/ntp_loss" in row


def step_times(rows: Sequence[Row]) -> StepTimes:
    """Return the seconds of the training steps."""
    timed = [row for row in rows if is_step(row) and row.get("time/step") is not None]
    return StepTimes(
        [row["time/step"] for row in timed if not is_refine(row)], [row["time/step"] for row in timed if is_refine(row)]
    )


def milestones(rows: Sequence[Row], baseline: Sequence[Row] = ()) -> list[tuple[str, Row]]:
    """Return those evaluations that frame the parts of a run, labelled: before, after NTP, after REFINE.

    baseline: rows of a run to compare with. Its last evaluation that is not later than the run's is added.
    """
    evaluations = [row for row in rows if is_evaluation(row)]
    start = next((row["step"] for row in rows if is_refine(row)), float("inf"))
    before = [row for row in evaluations if row["step"] == 0]
    after_ntp = [row for row in evaluations if 0 < row["step"] < start]
    after_refine = [row for row in evaluations if row["step"] >= start]
    end = evaluations[-1]["step"] if evaluations else -1
    other = [row for row in baseline if is_evaluation(row) and row["step"] <= end]
    parts = (("before", before), ("after NTP", after_ntp), ("after REFINE", after_refine), ("baseline", other))
    return [(label, part[-1]) for label, part in parts if part]
