"""What came out of a sweep: a row a point, a table, pictures."""

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, ScalarFormatter

from megatron_refine import markdown
from megatron_refine.files import numbered
from megatron_refine.files import write as write_file
from megatron_refine.report import metrics
from megatron_refine.report.summary import is_refine
from megatron_refine.report.svg import GRAY, PALETTE, draw, standalone
from megatron_refine.scaling.run import is_other, record
from megatron_refine.scaling.sweep import Point, Sweep

STAGES = ("score", "select", "rollout", "rescore", "reward", "update", "sync")
TIMES = ("score", "rollout", "rescore", "update", "sync")  # of the table


@dataclass(frozen=True)
class Result:
    """Medians over the steps of a point after its warm-up; seconds of a step."""

    name: str
    series: str
    ranks: int
    tp: int
    cp: int
    pp: int
    dp: int
    seq_length: int
    batch: int
    steps: int  # of which these are medians
    tokens_per_sec: float
    efficiency: float  # tokens/s of a rank / those of the sweep's smallest point of this length
    mfu: float
    step: float
    score: float
    select: float
    rollout: float
    rescore: float
    reward: float
    update: float
    sync: float
    peak_gib: float  # largest of a rank


def collect(sweep: Sweep, points: Sequence[Point]) -> tuple[list[Result], list[str]]:
    """Return results of the points with enough steps; for each other a line: its failure, or not run yet."""
    found, missing = list[Result](), list[str]()
    for point in points:
        rows = [row for row in metrics.read(point.folder / metrics.METRICS) if "train/loss" in row]
        rows = [row for row in rows if row["step"] > sweep.warm_up]
        if point.config.refine.enabled:
            rows = [row for row in rows if is_refine(row)]
        last = record(point)
        if is_other(point):
            missing.append(f"{point.name}: its folder has steps of another configuration")
        elif last.get("code"):
            missing.append(f"{point.name}: failed with code {last['code']}: {last['cause']}")
        elif not rows:
            missing.append(f"{point.name}: no steps after the warm-up yet{_last_error(point.folder)}")
        else:
            found.append(_result(point, rows))
    bases = {r.seq_length: r for r in sorted(found, key=lambda r: -r.ranks)}  # the smallest of each length
    return [_against(result, bases[result.seq_length]) for result in found], missing


def _last_error(folder: Path) -> str:
    """What its last attempt noted as its end, as jobs under SLURM do."""
    logs = [path for _, attempt in numbered(folder / "logs", "attempt_") if (path := attempt / "train.log").exists()]
    lines = logs[-1].read_text(encoding="utf-8", errors="replace").splitlines() if logs else []
    return f"; its last attempt: {lines[-1]}" if lines and "Error: " in lines[-1] else ""


def _result(point: Point, rows: Sequence[metrics.Row]) -> Result:
    def median(key: str) -> float:
        values = [row[key] for row in rows if row.get(key) is not None]
        return float(statistics.median(values)) if values else 0.0

    p = point.config.parallel
    stages = {stage: median(f"time/{stage}") for stage in STAGES}
    peak = max(row.get("perf/peak_memory_bytes") or 0 for row in rows) / 2**30
    return Result(
        point.name, point.series, point.ranks, p.tp, p.cp, p.pp, point.dp, point.config.data.seq_length,
        point.config.train.global_batch_size, len(rows), median("perf/tokens_per_sec"), 1.0, median("perf/mfu"),
        median("time/step"), **stages, peak_gib=peak,
    )  # fmt: skip


def _against(result: Result, base: Result) -> Result:
    efficiency = result.tokens_per_sec / result.ranks / (base.tokens_per_sec / base.ranks)
    return Result(**{**vars(result), "efficiency": efficiency})


def write(folder: Path, sweep: Sweep, results: Sequence[Result], missing: Sequence[str]) -> list[Path]:
    """results.csv, results.md and three pictures. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"results.csv": as_csv(results), "results.md": as_table(results, missing)}
    if results:
        files |= {f"{name}.svg": standalone(svg) for name, svg in pictures(sweep, results).items()}
    for name, text in files.items():
        write_file(folder / name, text)
    return [folder / name for name in files]


def as_csv(results: Sequence[Result]) -> str:
    """All columns."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(Result)])
    writer.writerows([f"{value:.6g}" if isinstance(value, float) else value for value in vars(r).values()]
                     for r in results)  # fmt: skip
    return text.getvalue()


def as_table(results: Sequence[Result], missing: Sequence[str]) -> str:
    """Markdown."""
    columns = ["ranks", "layout", "T", "batch", "tokens/s", "efficiency", "step, s", *TIMES, "peak, GiB"]
    rows = []
    for r in results:
        layout = ", ".join(f"{axis} {getattr(r, axis)}" for axis in ("tp", "cp", "pp", "dp") if getattr(r, axis) > 1)
        seconds = [f"{s:.3g}" for s in (r.step, *(getattr(r, stage) for stage in TIMES))]
        sizes = [str(r.ranks), layout or "one rank", str(r.seq_length), str(r.batch)]
        rows.append([*sizes, f"{r.tokens_per_sec:,.0f}", f"{r.efficiency:.0%}", *seconds, f"{r.peak_gib:.2f}"])
    lines = [markdown.table(columns, rows)]
    return "\n".join([*lines, *(["", "Without a result:", ""] if missing else []), *(f"- {m}" for m in missing)]) + "\n"


def pictures(sweep: Sweep, results: Sequence[Result]) -> dict[str, str]:
    """Throughput and efficiency over ranks; seconds of a step by stage; memory and sync."""
    names = sorted({(r.series, r.seq_length) for r in results})
    base = min(results, key=lambda r: r.ranks)

    def over_ranks(axes: Axes, key: str) -> None:
        for (series, length), colour in zip(names, PALETTE * len(names), strict=False):
            mine = [r for r in results if (r.series, r.seq_length) == (series, length)]
            x, y = [r.ranks for r in mine], [getattr(r, key) for r in mine]
            axes.plot(x, y, "o-", color=colour, ms=4, label=series)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="ranks", xticks=sorted({r.ranks for r in results}))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())

    def throughput(axes: Sequence[Axes]) -> None:
        left, right = axes
        over_ranks(left, "tokens_per_sec")
        x = sorted({r.ranks for r in results})
        left.plot(x, [base.tokens_per_sec * n / base.ranks for n in x], "--", color=GRAY, lw=1, label="ideal")
        left.set(title=f"tokens/s ({sweep.mode} scaling)", ylim=(0, None))
        left.legend(fontsize=7)
        over_ranks(right, "efficiency")
        right.set(title="efficiency", ylim=(0, None))

    def stages(axes: Sequence[Axes]) -> None:
        (only,), left = axes, [0.0] * len(results)
        labels = [r.name for r in results]
        for stage, colour in zip(STAGES, (*PALETTE, GRAY), strict=True):
            seconds = [getattr(r, stage) for r in results]
            if any(seconds):
                only.barh(labels, seconds, left=left, color=colour, label=stage, height=0.6)
                left = [a + b for a, b in zip(left, seconds, strict=True)]
        only.invert_yaxis()
        only.set(title="seconds of a step")
        only.legend(fontsize=7)

    def memory(axes: Sequence[Axes]) -> None:
        over_ranks(axes[0], "peak_gib")
        axes[0].set(title="peak memory of a rank, GiB", ylim=(0, None))
        axes[0].legend(fontsize=7)
        over_ranks(axes[1], "sync")
        axes[1].set(title="sync, seconds of a step", ylim=(0, None))

    return {
        "throughput": draw("throughput", throughput, widths=(1, 1)),
        "stages": draw("stages", stages),
        "memory": draw("memory", memory, widths=(1, 1)),
    }
