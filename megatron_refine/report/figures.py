"""The report's figures, from rows of metrics. Each function returns an <svg> element."""

from collections.abc import Mapping, Sequence
from itertools import cycle, pairwise

import numpy as np
from matplotlib.axes import Axes

from megatron_refine.report.metrics import STAGES, Row, by_step
from megatron_refine.report.summary import is_evaluation, is_refine
from megatron_refine.report.svg import BLUE, GRAY, GREEN, ORANGE, PALETTE, PURPLE, RED, draw

Values = np.ndarray  # [n] float64, nan where there is no number

_MAX_POINTS, _MAX_BARS = 1500, 90


def losses(rows: Sequence[Row]) -> str:
    """Draw the NTP loss in training and on held-out sequences; beside it the NSP loss of REFINE steps."""

    def paint(axes: Sequence[Axes]) -> None:
        ntp, nsp = axes
        ntp.set(title="NTP loss, nats a token", xlabel="step")
        _curve(ntp, [row for row in rows if "train/ntp_loss" in row], "train/ntp_loss", BLUE, "training")
        held_out = [row for row in rows if is_evaluation(row)]
        x, y = _column(held_out, "step"), _column(held_out, "eval/ntp_loss")
        if len(x):
            ntp.plot(x, y, "o-", color=ORANGE, ms=4, label="held-out")
        answered = [row for row in rows if "train/answer_loss" in row]
        if answered:
            _curve(ntp, answered, "train/answer_loss", GREEN, "answers")
        nsp.set(title="NSP (policy) loss", xlabel="step")
        _curve(nsp, [row for row in rows if is_refine(row)], "train/nsp_loss", PURPLE)
        _mark_start(ntp, rows)
        ntp.legend()

    return draw("losses", paint, widths=(2, 1))


def rewards(rows: Sequence[Row], sample: Sequence[float]) -> str:
    """Draw mean reward and its spread over the REFINE steps; beside them the rewards of the latest sample."""

    def paint(axes: Sequence[Axes]) -> None:
        over_steps, histogram = axes
        steps = [row for row in rows if is_refine(row)]
        x, mean, spread = (_column(steps, key) for key in ("step", "rollout/reward_mean", "rollout/reward_std"))
        over_steps.set(title="reward, mean and standard deviation", xlabel="step")
        over_steps.fill_between(x, mean - spread, mean + spread, color=GREEN, alpha=0.18, lw=0)
        _curve(over_steps, steps, "rollout/reward_mean", GREEN)
        histogram.set(title="rewards, latest sample", xlabel="reward", ylabel="rollouts")
        if sample:
            histogram.hist(sample, bins=min(20, max(5, len(sample) // 4)), color=GREEN, alpha=0.75)

    return draw("rewards", paint, widths=(2, 1))


def entropy(values: Sequence[float], positions: Sequence[int]) -> str:
    """Draw the entropy of predicting each token of a sequence, and mark the tokens at which rollouts start."""

    def paint(axes: Sequence[Axes]) -> None:
        nats = np.array(values, dtype=float)
        width = -(-len(nats) // _MAX_POINTS)  # long sequences: one point a window of tokens
        token = np.arange(len(nats)) + 1  # entropy[t] is that of predicting token t + 1
        axes[0].set(title="entropy, nats", xlabel="token", xlim=(0, len(nats)), ylim=(0, np.nanmax(nats) * 1.08))
        axes[0].plot(_windows(token, width), _windows(nats, width), color=BLUE, lw=0.8)
        marked = [p for p in positions if 0 < p <= len(nats)]
        axes[0].vlines(marked, 0, nats[[p - 1 for p in marked]], color=ORANGE, lw=1, alpha=0.8)
        axes[0].plot(marked, nats[[p - 1 for p in marked]], "o", color=ORANGE, ms=5, label="a rollout starts here")
        if marked:
            axes[0].legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)

    return draw("entropy", paint)


def text_entropy(entropy: Values, smoothed: Values, chances: Values, borders: Sequence[int]) -> str:
    """Draw the entropy of predicting each token of a text, raw and smoothed, and the probability of each token that a
    rollout starts there; dotted lines are the borders of chunks. All of [n]; nan where there is none."""

    def paint(axes: Sequence[Axes]) -> None:
        width = -(-len(entropy) // _MAX_POINTS)
        token, chance, low = _windows(np.arange(len(entropy)), width), _windows(chances, width), axes[0].twinx()
        low.fill_between(token, chance, color=GREEN, alpha=0.3, lw=0)
        low.set(ylabel="probability of a start", ylim=(0, 3 * max(chance.max(), 1e-9)))
        low.grid(visible=False)
        axes[0].set(title="entropy, nats", xlabel="token", xlim=(0, len(entropy)), ylim=(0, np.nanmax(entropy) * 1.08))
        axes[0].plot(token, _windows(entropy, width), color=BLUE, lw=0.6, alpha=0.5, label="entropy")
        axes[0].plot(token, _windows(smoothed, width), color=ORANGE, lw=1, label="smoothed, as positions are selected")
        for border in borders:
            axes[0].axvline(border, color=GRAY, lw=0.8, ls=":")
        axes[0].legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, ncols=2)

    return draw("text-entropy", paint)


def stages(rows: Sequence[Row]) -> str:
    """Draw the seconds of each step by stage, stacked; in a long run windows of steps.

    Stages of under 1% are summed up.
    """

    def paint(axes: Sequence[Axes]) -> None:
        width = -(-len(rows) // _MAX_BARS)
        whole = np.nan_to_num(_column(rows, "time/step"))
        seconds = {stage: np.nan_to_num(_column(rows, f"time/{stage}")) for stage in STAGES}
        shown = {stage: values for stage, values in seconds.items() if values.sum() > 0.01 * whole.sum()}
        shown["other"] = np.maximum(whole - sum(shown.values()), 0)
        x = _windows(_column(rows, "step"), width)
        bottom = np.zeros(len(x))
        for (stage, values), color in zip(shown.items(), _stage_colors(len(shown)), strict=True):
            height = _windows(values, width)
            axes[0].bar(x, height, 0.85 * width, bottom, color=color, label=stage)
            bottom += height
        axes[0].set(title="seconds a step", xlabel="step", xlim=(x[0] - width, x[-1] + width))
        _mark_start(axes[0], rows)
        axes[0].legend(loc="upper left", bbox_to_anchor=(1, 1))

    return draw("stages", paint)


def gaps(rows: Sequence[Row]) -> str:
    """Draw how far log-probabilities of rollouts by engine and by training kernels lie apart, on a log scale."""

    def paint(axes: Sequence[Axes]) -> None:
        floor = 1e-9  # a log scale has no place for 0
        largest, mean = (np.fmax(_column(rows, f"rollout/logprob_gap_{key}"), floor) for key in ("max", "mean"))
        for values, color, label in ((largest, RED, "largest"), (mean, GRAY, "mean")):
            axes[0].plot(_column(rows, "step"), values, marker=_marker(len(rows)), ms=4, color=color, label=label)
        low, high = np.floor(np.log10(mean.min())), np.floor(np.log10(largest.max())) + 1  # whole decades
        axes[0].set(title="log-prob gap, nats", xlabel="step", yscale="log", ylim=(10**low, 10**high))
        axes[0].minorticks_off()
        axes[0].legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, ncols=2)

    return draw("gaps", paint)


def compared(runs: Mapping[str, Sequence[Sequence[Row]]]) -> str:
    """Draw NTP loss, reward with its standard deviation, and accuracy of runs by label, a colour each.

    Points are held-out sequences. Of several runs of a label the mean is drawn, and the range between them.
    """

    def paint(axes: Sequence[Axes]) -> None:
        loss, reward, accuracy = axes
        loss.set(title="NTP loss, nats a token", xlabel="step")
        reward.set(title="reward of the rollouts, mean (line) and std (dotted)", xlabel="step")
        accuracy.set(title="held-out accuracy of the argmax", xlabel="step")
        for (label, group), color in zip(runs.items(), cycle(PALETTE)):  # noqa: B905 - the colours have no end
            _curve(loss, _mean_rows(group, "train/ntp_loss"), "train/ntp_loss", color, label)
            _range(loss, group, "train/ntp_loss", color)
            held_out = _mean_rows(group, "eval/ntp_loss")
            loss.plot(_column(held_out, "step"), _column(held_out, "eval/ntp_loss"), "o", color=color, ms=4)
            _curve(reward, _mean_rows(group, "rollout/reward_mean"), "rollout/reward_mean", color, label)
            _range(reward, group, "rollout/reward_mean", color)
            spread = _mean_rows(group, "rollout/reward_std")
            reward.plot(_column(spread, "step"), _column(spread, "rollout/reward_std"), ":", color=color, lw=1)
            right = _mean_rows(group, "eval/ntp_accuracy")
            accuracy.plot(_column(right, "step"), _column(right, "eval/ntp_accuracy"), "o-", color=color, ms=4)
            _range(accuracy, group, "eval/ntp_accuracy", color)
        loss.legend()

    return draw("compared", paint, widths=(1, 1, 1))


def _mean_rows(group: Sequence[Sequence[Row]], key: str) -> list[Row]:
    return [{"step": step, key: sum(values) / len(values)} for step, values in by_step(group, key).items()]


def _range(axes: Axes, group: Sequence[Sequence[Row]], key: str, color: str) -> None:
    values = by_step(group, key)
    if len(group) > 1 and values:
        low, high = zip(*((min(each), max(each)) for each in values.values()), strict=True)
        axes.fill_between(list(values), low, high, color=color, alpha=0.15, lw=0)


def _column(rows: Sequence[Row], key: str) -> Values:
    return np.array([np.nan if row.get(key) is None else row[key] for row in rows], dtype=float)


def _curve(axes: Axes, rows: Sequence[Row], key: str, color: str, label: str = "") -> None:
    """Draw a line; in a run of many steps a faint one, under its running mean over a thirtieth of them."""
    x, y = _column(rows, "step"), _column(rows, key)
    window = len(rows) // 30
    if window < 3:
        axes.plot(x, y, color=color, marker=_marker(len(rows)), ms=4, label=label)
        return
    axes.plot(x, y, color=color, lw=0.6, alpha=0.35)
    finite = np.isfinite(y)
    ones = np.ones(window)
    total, count = (np.convolve(part, ones, "valid") for part in (np.where(finite, y, 0), finite))
    centre = window // 2
    axes.plot(x[centre : centre + len(total)], total / np.where(count > 0, count, np.nan), color=color, label=label)


def _windows(values: Values, width: int) -> Values:
    """Return means of `width` consecutive values; the last window may be shorter."""
    return np.array([values[a:b].mean() for a, b in pairwise([*range(0, len(values), width), len(values)])])


def _mark_start(axes: Axes, rows: Sequence[Row]) -> None:
    """Draw a line in front of the first REFINE step, where it follows steps of next-token prediction alone."""
    start = next((index for index, row in enumerate(rows) if is_refine(row)), 0)
    if start and rows[start - 1]["step"] > 0:
        x = rows[start]["step"] - 0.5
        axes.axvline(x, color=GRAY, lw=1, ls=(0, (4, 3)))
        axes.text(x, 1.02, "REFINE", color=GRAY, transform=axes.get_xaxis_transform())


def _marker(count: int) -> str:
    """Return the marker of points. Few are marked, so that a single one is seen."""
    return "o" if count <= 30 else ""


def _stage_colors(count: int) -> list[str]:
    """Return distinct colours for the stages; gray for the last, "other"."""
    return [PALETTE[index % len(PALETTE)] for index in range(count - 1)] + [GRAY]
