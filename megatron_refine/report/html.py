"""report.html: a run on one page, from its folder alone."""

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from megatron_refine.files import TornError, numbered, read_json, write
from megatron_refine.report import figures, page
from megatron_refine.report.metrics import METRICS, Row, read
from megatron_refine.report.screen import COLUMNS, median_line, number
from megatron_refine.report.summary import is_evaluation, is_refine, is_step, milestones, step_times

Samples = dict[str, Any]
"""step, entropy [T], positions [c], rewards [R], rollouts: a list of {position, prefix, truth, rollout, reward}"""


def write_report(run_dir: str | Path, baseline: Sequence[Row] = ()) -> Path:
    """Write <run_dir>/report.html from metrics.jsonl, samples.json, config.yaml and logs/, whichever there are.

    baseline: rows of a run to compare with, for the table of held-out metrics. Returns the page's path. The page is
    written beside the old one and then takes its place. Raises OSError, and TornError for damaged metrics.
    """
    run = Path(run_dir)
    rows = read(run / METRICS)
    path = run / "report.html"
    body = _body(run, rows, baseline, _read_samples(run / "samples.json"))
    write(path, page.document(f"{run.resolve().name}: REFINE report", body))
    return path


def _read_samples(path: Path) -> Samples:
    """Read the samples, {} without the file. For a torn one say so as `damaged`: the rest of the page counts."""
    try:
        return dict(read_json(path)) if path.exists() else {}
    except (TornError, TypeError, ValueError) as error:
        return {"damaged": f"{error}" if isinstance(error, TornError) else f"{path}: damaged: no sample"}


def _body(run: Path, rows: Sequence[Row], baseline: Sequence[Row], samples: Samples) -> list[str]:
    return [
        f"<h1>{escape(run.resolve().name)}</h1>",
        _headline(rows),
        _comparison(rows, baseline),
        _tasks(rows),
        _answers(run),
        _losses(rows),
        _rewards(rows, samples),
        _entropy(samples),
        _rollouts(samples),
        _stages(rows),
        _gap(rows),
        _restarts(run, rows),
        _configuration(run),
    ]


def _headline(rows: Sequence[Row]) -> str:
    steps = [row for row in rows if is_step(row)]
    if not steps:
        return '<p class="note">No training step has been logged.</p>'
    last, ratio = steps[-1], step_times(rows).ratio
    refine = [row for row in steps if is_refine(row)]
    facts = [("steps", str(last["step"])), ("REFINE steps", str(len(refine)))]
    facts += [("sequences seen", f"{last['consumed_samples']:,}")] if "consumed_samples" in last else []
    facts += [("NTP loss, last step", number(last, "train/ntp_loss", ".3f"))]
    facts += [("reward, last step", number(refine[-1], "rollout/reward_mean", ".3f"))] if refine else []
    facts += [("REFINE / NTP time", f"{ratio:.2f}")] if ratio else []
    return page.tiles(facts)


def _comparison(rows: Sequence[Row], baseline: Sequence[Row]) -> str:
    framed = milestones(rows, baseline)
    if not framed:
        return page.section("Comparison", page.text(f"No evaluation has been made. {median_line(step_times(rows))}."))
    cells = [
        [escape(label), str(row["step"]), *(number(row, key, form) for key, form in COLUMNS.values())]
        for label, row in framed
    ]
    body = page.table(["held-out", "step", *COLUMNS], cells, numbers=range(1, 2 + len(COLUMNS)))
    note = "Accuracy is of the most probable token; reward and greedy match compare rollouts with the true text."
    return page.section("Comparison", body, f"{note} {median_line(step_times(rows))}.")


def _tasks(rows: Sequence[Row]) -> str:
    """Return the scores of tasks, in a run that evaluates some."""
    names = list(dict.fromkeys(key for row in rows for key in row if key.startswith("task/") and key != "task/score"))
    if not names:
        return ""
    scored = [row for row in rows if any(name in row for name in names)]
    cells = [[str(row["step"]), *(number(row, name, ".1%") for name in names)] for row in scored]
    heads = ["step", *(escape(name.removeprefix("task/")) for name in names)]
    return page.section("Tasks", page.table(heads, cells, numbers=range(len(heads))), "Mean score of each evaluation.")


def _answers(run: Path) -> str:
    """Return the scores of the answers, in test-time training."""
    path = run / "predictions.jsonl"
    if not path.exists():
        return ""
    scores: dict[str, list[float]] = {}
    for row in read(path):
        scores.setdefault(row["task"], []).append(row["score"])
    cells = [[escape(task), str(len(found)), f"{sum(found) / len(found):.1%}"] for task, found in scores.items()]
    body = page.table(("task", "prompts", "mean score"), cells, numbers=(1, 2))
    return page.section("Answers", body, "After a step on each batch of prompts; every answer is in predictions.jsonl.")


def _losses(rows: Sequence[Row]) -> str:
    if not any(is_step(row) or is_evaluation(row) for row in rows):
        return page.section("Losses", page.text("No step has been logged."))
    note = "On-policy, the NSP loss is near zero whatever is learned: its progress shows in the reward."
    return page.section("Losses", page.figure(figures.losses(rows)), note)


def _rewards(rows: Sequence[Row], samples: Samples) -> str:
    if not any(is_refine(row) for row in rows):
        return page.section("Rewards", page.text("This run has no REFINE step, so there are no rewards."))
    note = "How close rollouts come to the text that really follows; the spread is what the advantages are made of."
    return page.section("Rewards", page.figure(figures.rewards(rows, samples.get("rewards", []))), note)


def _entropy(samples: Samples) -> str:
    if not samples.get("entropy"):
        return page.section(
            "Entropy and selected positions",
            page.text(samples.get("damaged") or "No sample of a sequence has been saved."),
        )
    svg = figures.entropy(samples["entropy"], samples.get("positions", []))
    note = f"A sequence at step {samples['step']}. Each chunk of it has one start."
    return page.section("Entropy and selected positions", page.figure(svg), note)


def _rollouts(samples: Samples) -> str:
    if not samples.get("rollouts"):
        return page.section("Rollouts", page.text(samples.get("damaged") or "No sample of rollouts has been saved."))
    headings = ("position", "prefix", "true continuation", "rollout", "reward")
    body = page.table(headings, map(_rollout, samples["rollouts"]), numbers=(0, 4))
    note = f"Step {samples['step']}. What agrees with the true text from its first character on is highlighted."
    return page.section("Rollouts", body, note)


def _rollout(sample: dict[str, Any]) -> list[str]:
    truth, rollout = sample["truth"], sample["rollout"]
    matched = len(os.path.commonprefix([truth, rollout]))
    texts = [page.visible(sample["prefix"]), page.visible(truth), page.visible(rollout, matched)]
    return [str(sample["position"]), *texts, f"{sample['reward']:.3f}"]


def _stages(rows: Sequence[Row]) -> str:
    timed = [row for row in rows if is_step(row) and row.get("time/step")]
    if not timed:
        return page.section("Time per stage", page.text("No step has been timed."))
    note = "Seconds of each step; <em>other</em> is what no stage accounts for, and stages of under 1% of the run."
    return page.section("Time per stage", page.figure(figures.stages(timed)), note)


def _gap(rows: Sequence[Row]) -> str:
    measured = [row for row in rows if row.get("rollout/logprob_gap_mean") is not None]
    if not measured:
        return page.section("Log-prob gap", page.text("No rollout has been compared with the training kernels."))
    note = "Between the rollout engine and the training kernels; a rise means that the engine drifts from the trainer."
    masked = max(row.get("rollout/masked_fraction") or 0.0 for row in measured)
    note += f" At most {masked:.1%} of a step's rollouts were masked (engine.mask_gap)." if masked else ""
    return page.section("Log-prob gap", page.figure(figures.gaps(measured)), note)


def _restarts(run: Path, rows: Sequence[Row]) -> str:
    """Return the attempts, known by log folders and by rows. One that left no row stopped before its first step."""
    steps: dict[int, list[int]] = {number: [] for number, _ in numbered(run / "logs", "attempt_")}
    for row in rows:
        if is_step(row) and "attempt" in row:
            steps.setdefault(row["attempt"], []).append(row["step"])
    if len(steps) < 2:
        return page.section("Restarts", page.text("The run was never restarted."))
    cells = [[str(a), str(s[0]) if s else "-", str(s[-1]) if s else "-"] for a, s in sorted(steps.items())]
    restarts = f"{len(steps) - 1} restart{'s' * (len(steps) > 2)}. A repeated step counts for the later attempt."
    return page.section("Restarts", page.table(("attempt", "first step", "last step"), cells, numbers=(1, 2)), restarts)


def _configuration(run: Path) -> str:
    path = run / "config.yaml"
    if not path.exists():
        return page.section("Configuration", page.text("The run folder has no config.yaml."))
    yaml = f"<pre>{escape(path.read_text('utf-8', errors='replace'))}</pre>"
    return page.section("Configuration", f"<details><summary>config.yaml</summary>{yaml}</details>")
