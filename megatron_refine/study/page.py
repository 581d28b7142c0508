"""The tables and sentences of a study, and docs/learning.md, whose template holds the prose around them."""

from collections.abc import Iterator, Sequence
from statistics import fmean, median, stdev

from megatron_refine.markdown import table
from megatron_refine.report import metrics
from megatron_refine.report.summary import is_step
from megatron_refine.study.findings import KEYS, Difference, Ends, Values, differences, holm, no_worse, values
from megatron_refine.study.plan import Contrast, Metric, Plan
from megatron_refine.study.run import finished

NOTE = "<!-- Written by `make study`: edit learning.md.in instead. -->\n\n"
PERCENT = {"greedy match", "recall", "accuracy", "sampled accuracy"}
DIGITS = {"reward": 4, "loss": 4, "entropy": 3}


def page(template: str, plan: Plan) -> str:
    """Fill in {contrasts}, {arms}, {seeds} and {costs} of the template, from the runs that have finished."""
    ends = finished(plan)
    parts = {
        "contrasts": "\n\n".join(_contrasts(plan, ends)),
        "arms": _arms(plan, ends),
        "seeds": _seeds(ends),
        "costs": _costs(ends),
    }
    for name, part in parts.items():
        template = template.replace(f"{{{name}}}", part)
    return NOTE + template


def _contrasts(plan: Plan, ends: Ends) -> Iterator[str]:
    for model in plan.models:
        for contrast in plan.contrasts:
            found = differences(ends, model, contrast)
            if found:
                bases = next(iter(found.values())).n
                title = f"**{model}: {contrast.arm}, less {contrast.against}** ({bases} bases)"
                yield f"{title}\n\n{_differences(contrast, found)}\n\n{_verdict(contrast, found)}"


def _differences(contrast: Contrast, found: dict[Metric, Difference]) -> str:
    asked = [metric for metric in contrast.guards if metric in found]
    corrected = dict(zip(asked, holm([found[metric].p for metric in asked]), strict=True))
    if contrast.primary in found:
        corrected[contrast.primary] = found[contrast.primary].p
    rows = [
        [metric, _number(metric, d.mean, sign=True), _between(metric, d), _p(corrected.get(metric)),
         _number(metric, contrast.margins[metric], sign=True) if metric in contrast.margins else ""]
        for metric, d in found.items()
    ]  # fmt: skip
    return table(["metric", "difference", "95 % interval", "p", "margin"], rows)


def _verdict(contrast: Contrast, found: dict[Metric, Difference]) -> str:
    """Say what was asked beforehand, and what came out."""
    said = []
    if contrast.primary in found:
        d = found[contrast.primary]
        higher = d.low > 0
        said.append(
            f"The {contrast.primary} {'is higher' if higher else 'is not shown to be higher'} "
            f"(p = {d.p:.3f}; the least that {d.n} bases can give is {2.0**-d.n:.3f})."
        )
    for metric, margin in contrast.margins.items():
        if metric in found:
            word = "No worse" if no_worse(found[metric], margin) else "Not shown to be no worse"
            said.append(f"{word} in {metric}, by the margin of {_number(metric, margin, sign=True)}.")
    return " ".join(said) or "Nothing was asked of it beforehand."


def _arms(plan: Plan, ends: Ends) -> str:
    """A line an arm: means over its runs, and their standard deviation. The bases come first."""
    rows = []
    for model in plan.models:
        own = [end for end in ends if end[0].model == model]
        for arm in ("", *plan.arms):
            if found := [values(run, last) for run, _, last in own if run.arm == arm]:
                rows.append([model, arm or "base", *_spread(found)])
    return table(["model", "arm", "runs", *KEYS], rows)


def _spread(runs: Sequence[Values]) -> list[str]:
    cells = [str(len(runs))]
    for metric in KEYS:
        found = [each[metric] for each in runs if metric in each]
        wide = f" ± {_number(metric, stdev(found))}" if len(found) > 1 else ""
        cells.append(f"{_number(metric, fmean(found))}{wide}" if found else "-")
    return cells


def _seeds(ends: Ends) -> str:
    rows = []
    for run, _, last in ends:
        found, seed = values(run, last), str(run.seed) if run.arm else ""
        cells = (_number(metric, found[metric]) if metric in found else "-" for metric in KEYS)
        rows.append([run.model, str(run.base), seed, run.arm or "base", *cells])
    return table(["model", "base", "seed", "arm", *KEYS], rows)


def _costs(ends: Ends) -> str:
    """A line an arm: the median of all its steps, over the least of these medians of its model."""
    times: dict[str, dict[str, list[float]]] = {}
    for run, *_ in ends:
        if run.arm:
            found = times.setdefault(run.model, {}).setdefault(run.arm, [])
            found += [row["time/step"] for row in metrics.read(run.folder / metrics.METRICS) if is_step(row)]
    lines = []
    for model, arms in times.items():
        medians = {arm: median(seconds) for arm, seconds in arms.items()}
        lines += [[model, arm, f"{seconds / min(medians.values()):.2f}"] for arm, seconds in medians.items()]
    return table(["model", "arm", "step, least = 1"], lines)


def _number(metric: Metric, value: float, sign: bool = False) -> str:
    plus = "+" if sign else ""
    unit = "pp" if sign else "%"
    return f"{100 * value:{plus}.2f} {unit}" if metric in PERCENT else f"{value:{plus}.{DIGITS[metric]}f}"


def _between(metric: Metric, d: Difference) -> str:
    return f"{_number(metric, d.low, sign=True)} to {_number(metric, d.high, sign=True)}" if d.n > 1 else "one base"


def _p(p: float | None) -> str:
    return "" if p is None else f"{p:.3f}"
