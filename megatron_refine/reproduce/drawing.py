"""The paper's figures of curves and ablations, as SVG."""

from collections.abc import Mapping, Sequence
from itertools import cycle

from matplotlib.axes import Axes

from megatron_refine.report.svg import PALETTE, draw, standalone
from megatron_refine.reproduce.scores import Spread

Points = Sequence[tuple[float, float]]


def over_steps(panels: Mapping[str, Mapping[str, Sequence[Spread]]]) -> str:
    """Draw a panel a title, a line an arm, and a band from the least to the largest of its seeds."""

    def paint(axes: Sequence[Axes]) -> None:
        for each, (title, arms) in zip(axes, panels.items(), strict=True):
            each.set(title=title, xlabel="step")
            for (label, points), color in zip(arms.items(), cycle(PALETTE)):  # noqa: B905 - the colours have no end
                steps = [point.step for point in points]
                each.plot(steps, [point.mean for point in points], "o-", color=color, ms=3, label=label)
                low, high = [point.low for point in points], [point.high for point in points]
                each.fill_between(steps, low, high, color=color, alpha=0.15, lw=0)
            each.legend()

    return standalone(draw("steps", paint, widths=(1,) * len(panels)))


def ablation(panels: Mapping[str, Mapping[str, Points]]) -> str:
    """Draw a panel a parameter, a line a source of (value, score)."""

    def paint(axes: Sequence[Axes]) -> None:
        for each, (title, sources) in zip(axes, panels.items(), strict=True):
            each.set(title=title)
            for (label, points), color in zip(sources.items(), cycle(PALETTE)):  # noqa: B905 - the colours have no end
                style = "s" if label.endswith("paper") else "o-"
                each.plot([x for x, _ in points], [y for _, y in points], style, color=color, ms=5, label=label)
            each.legend()

    return standalone(draw("ablation", paint, widths=(1,) * len(panels)))
