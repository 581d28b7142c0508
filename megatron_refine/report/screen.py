"""The lines a run writes on the screen, from rows of metrics. Pure functions."""

import math
from collections.abc import Sequence
from statistics import mean, median, stdev

from megatron_refine.report.metrics import Row
from megatron_refine.report.summary import StepTimes, is_evaluation, is_refine

COLUMNS = {  # heading -> key, format
    "ntp loss": ("eval/ntp_loss", ".3f"),
    "accuracy": ("eval/ntp_accuracy", ".1%"),
    "entropy": ("eval/entropy", ".2f"),
    "reward": ("eval/reward_mean", ".3f"),
    "greedy match": ("eval/greedy_match", ".2f"),
}
_SHARES = ("score", "rollout", "update")


def step_line(metrics: Row, total_steps: int, left: float | None = None) -> str:
    """One training step. Shares are of the step's seconds, the gap is the mean between engine and trainer in nats.
    left: seconds until the end of the run.

    Masked rollouts, the loss of answers (post-training) and their score (test time) are told where there are any. The
    NSP loss is told where it is not 0, as it is by construction in the first optimizer step of a batch.
    """
    parts = [f"step {metrics['step']}/{total_steps} loss {number(metrics, 'train/loss', '.2f')}{_losses(metrics)}"]
    parts.append(f"lr {short(metrics.get('train/lr'))} grad {number(metrics, 'train/grad_norm', '.2f')}")
    parts.append(f"{_speed(metrics)} {number(metrics, 'time/step', '.2f')}s mem {_memory(metrics)}")
    parts += [f"{_stages(metrics)}"] if is_refine(metrics) else []
    parts += [] if left is None else [f"left {duration(left)}"]
    return " | ".join(parts)


def _losses(metrics: Row) -> str:
    text = f" answer {number(metrics, 'train/answer_loss', '.2f')}" if "train/answer_loss" in metrics else ""
    text += f" score {number(metrics, 'task/score', '.1%')}" if "task/score" in metrics else ""
    if not is_refine(metrics):
        return text
    text += f" ntp {number(metrics, 'train/ntp_loss', '.2f')}"
    nsp = number(metrics, "train/nsp_loss", ".3f")
    text += "" if nsp == "0.000" else f" nsp {nsp}"
    reward, deviation = (number(metrics, f"rollout/reward_{key}", ".2f") for key in ("mean", "std"))
    return f"{text} reward {reward}±{deviation}"


def eval_line(metrics: Row) -> str:
    """Describe an evaluation on held-out sequences; rewards and greedy matches only where rollouts were made."""
    parts = [
        f"eval step {metrics['step']}: ntp {number(metrics, 'eval/ntp_loss', '.2f')}",
        f"accuracy {number(metrics, 'eval/ntp_accuracy', '.1%')}",
        f"entropy {number(metrics, 'eval/entropy', '.2f')}",
    ]
    if "eval/reward_mean" in metrics:
        parts.append(f"reward {number(metrics, 'eval/reward_mean', '.3f')}")
    if "eval/greedy_match" in metrics:
        parts.append(f"greedy_match {number(metrics, 'eval/greedy_match', '.2f')}")
    return " ".join(parts)


def comparison(evals: Sequence[tuple[str, Row]], times: StepTimes) -> str:
    """Describe a finished run: a labelled row an evaluation, then the median seconds of NTP and REFINE steps."""
    width = max((len(label) for label, _ in evals), default=0)
    lines = [" " * width + "  step" + "".join(f"  {heading:>8}" for heading in COLUMNS)] if evals else []
    for label, row in evals:
        cells = (f"  {number(row, key, form):>{max(8, len(name))}}" for name, (key, form) in COLUMNS.items())
        lines.append(f"{label:<{width}}{row['step']:>6}" + "".join(cells))
    return "\n".join(lines + [median_line(times)])


def spread(runs: Sequence[Sequence[Row]]) -> str:
    """Describe the last evaluations of several runs: a row a metric, with mean, standard deviation, lowest, highest."""
    last = [[row for row in rows if is_evaluation(row)][-1:] for rows in runs]
    lines = []
    for heading, (key, form) in COLUMNS.items():
        values = [row[0][key] for row in last if row and row[0].get(key) is not None]
        if values:
            deviation = stdev(values) if len(values) > 1 else 0.0
            told = (format(value, form) for value in (mean(values), deviation, min(values), max(values)))
            lines.append("{:<14}{:>8} ± {}  ({} to {})".format(heading, *told))
    return "\n".join(lines)


def median_line(times: StepTimes) -> str:
    """Write the median seconds of steps and their ratio: `NTP step 0.51 s, REFINE step 0.61 s, ratio 1.20`."""
    kinds = (("NTP", times.ntp), ("REFINE", times.refine))
    parts = [f"{kind} step {median(seconds):.3g} s" for kind, seconds in kinds if seconds]
    ratio = [] if times.ratio is None else [f"ratio {times.ratio:.2f}"]
    return ", ".join(parts + ratio) or "No step was timed"


def number(row: Row, key: str, form: str) -> str:
    """Write a number of the row: - where it has none, nan for null, which stands for one that was not finite."""
    if key not in row:
        return "-"
    text = "nan" if row[key] is None else f"{row[key]:{form}}"
    return text.removeprefix("-") if not text.strip("-0.%") else text  # a loss that rounds to zero has no sign


def _speed(metrics: Row) -> str:
    speed = f"{_amount(metrics.get('perf/tokens_per_sec'))} tok/s"
    return speed if metrics.get("perf/mfu") is None else f"{speed} mfu {metrics['perf/mfu']:.0%}"


def _stages(metrics: Row) -> str:
    whole = metrics.get("time/step") or math.nan
    shares = " ".join(f"{stage} {(metrics.get(f'time/{stage}') or 0.0) / whole:.0%}" for stage in _SHARES)
    gap = short(metrics.get("rollout/logprob_gap_mean"))
    return f"{shares} sync {metrics.get('time/sync') or 0.0:.1f}s gap {gap}{_masked(metrics)}"


def _memory(metrics: Row) -> str:
    value = metrics.get("perf/peak_memory_bytes")
    return "-" if value is None else f"{value / 2**30:.1f}G"


def duration(seconds: float) -> str:
    """Seconds as people say them: 45s, 12m, 3h05m, 2d04h."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 90:
        return f"{seconds:.0f}s"
    if minutes < 100:
        return f"{minutes}m"
    return f"{minutes // 60}h{minutes % 60:02}m" if minutes < 48 * 60 else f"{hours // 24}d{hours % 24:02}h"


def _masked(metrics: Row) -> str:
    share = metrics.get("rollout/masked_fraction") or 0.0
    return f" masked {share:.0%}" if share >= 0.01 else " masked <1%" if share > 0 else ""


def _amount(value: float | None) -> str:
    if value is None:
        return "nan"
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"


def short(value: float | None) -> str:
    """One digit and its power of ten: 1e-6."""
    if value is None or not math.isfinite(value):
        return "nan"
    digit, power = f"{value:.0e}".split("e")
    return f"{digit}e{int(power)}" if value else "0"
