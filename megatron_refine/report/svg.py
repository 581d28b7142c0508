"""Matplotlib figures as inline SVG, in the page's colours and font.

Colours are CSS variables of the page, so that one figure serves its light and its dark theme.
"""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_refine.report.page import COLOURS

# Colours that occur nowhere else, each replaced by its CSS variable once the figure is text.
INK, GRID, BLUE, ORANGE, GREEN, PURPLE, RED, GRAY = (f"#0000e{digit}" for digit in range(8))
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, RED, INK)  # of one line after the other
_VARIABLES = dict(
    zip(
        (INK, GRID, BLUE, ORANGE, GREEN, PURPLE, RED, GRAY),
        ("ink", "grid", "blue", "orange", "green", "purple", "red", "gray"),
        strict=True,
    )
)
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it takes the page's font and can be searched
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "font.size": 9,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.5,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


WIDE, PHONE = (9.2, 2.9), (4.2, 2.6)  # inches of a figure, and of one of its axes on a narrow screen


def draw(name: str, paint: Callable[[Sequence[Axes]], None], widths: Sequence[float] = (1,)) -> str:
    """Axes, painted, as two <svg> elements: side by side, and one below the other for a narrow screen.

    The page shows one of them. `name` makes ids unique on the page.
    """
    count = len(widths)
    wide = _drawn(name, paint, WIDE, {"ncols": count, "width_ratios": widths})
    tall = _drawn(f"{name}-tall", paint, (PHONE[0], PHONE[1] * count), {"nrows": count})
    return wide.replace("<svg", '<svg class="wide"', 1) + tall.replace("<svg", '<svg class="tall"', 1)


def _drawn(name: str, paint: Callable[[Sequence[Axes]], None], size: tuple[float, float], grid: dict[str, Any]) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        axes = list(figure.subplots(**grid, squeeze=False).flat)
        paint(axes)
        for each in axes:
            each.grid(axis="x", visible=False)
            if each.get_xlabel() == "step":
                each.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
            each.spines["left"].set_visible(False)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\1{name}-", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    return svg


def standalone(svg: str) -> str:
    """Return the wide one of a figure as a file of its own: it brings the page's colours with it."""
    tag, rest = svg.partition("</svg>")[0].split(">", 1)
    return f"{tag}><style>{COLOURS}</style>{rest}</svg>\n"
