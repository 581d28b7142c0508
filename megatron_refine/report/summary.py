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


# What counts as a change between two evaluations of the same sequences with the same draws.
SHARPER = {"eval/reward_mean": 0.005, "eval/greedy_match": -0.005, "eval/entropy": -0.02}


def sharpened(framed: Sequence[tuple[str, Row]]) -> str:
    """Say in one line that REFINE has made the distribution sharper and not better: the reward of sampled rollouts rose
    while their greedy match and the entropy fell. "" otherwise. framed: as `milestones` gives them."""
    rows = dict(framed)
    before, after = rows.get("after NTP") or rows.get("before"), rows.get("after REFINE")
    changes = {key: _change(before, after, key) for key in SHARPER} if before and after else {}
    if not changes or not all(changes[key] * step > step * step for key, step in SHARPER.items()):
        return ""
    reward, match, entropy = changes.values()
    return (
        f"sharper, not better: with REFINE the reward of sampled rollouts rose by {reward:.3f}, while greedy match "
        f"fell by {-match:.3f} and entropy by {-entropy:.2f} nats; lower refine.nsp_coef or optimizer.lr"
    )


def _change(before: Row, after: Row, key: str) -> float:
    first, last = before.get(key), after.get(key)
    return 0.0 if first is None or last is None else last - first


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
