"""The page of an item, ITEM.md: the paper's numbers beside ours, figures, and in which settings both differ."""

from collections.abc import Sequence
from pathlib import Path

from megatron_refine.files import write
from megatron_refine.markdown import table
from megatron_refine.reproduce.chain import Chain
from megatron_refine.reproduce.items import ITEMS, Column, Item, Row
from megatron_refine.reproduce.published import published
from megatron_refine.reproduce.scores import Spread, cell, curve, notes
from megatron_refine.reproduce.setting import Setting

PAPER, NONE = "arXiv 2602.16704v1", "-"


def collect(setting: Setting, name: str, models: Sequence[str]) -> Path:
    """Write the page of an item, and its figure, from what is there. Return the page."""
    item, chains = ITEMS[name], [Chain(setting, model) for model in models]
    parts = [f"# {item.title}"]
    for chain in chains:
        body = _curves(chain, item) if item.kind == "steps" else _entropy(chain) if item.kind == "entropy" else ""
        parts.append(f"## {chain.model}\n\n{body or _table(chain, item)}")
    figure = _figure(item, chains) if name.startswith("fig") and item.kind != "entropy" else ""
    if figure:
        write(setting.out / f"{name}.svg", figure)
        parts.append(f"![{item.title}]({name}.svg)")
    lines = [*([item.note] if item.note else []), *differences(setting, item), *_haystacks(chains, item)]
    parts.append("\n".join(f"- {line}" for line in lines))
    page = setting.out / f"{name}.md"
    write(page, "\n\n".join(parts) + "\n")
    return page


def _table(chain: Chain, item: Item) -> str:
    """Two lines a row: what the paper prints, and ours."""
    lines = []
    for row in item.rows:
        printed = published(item.table, chain.model, row.runs[0])
        theirs = [f"{number:.1f}" for number in printed] or [NONE] * len(item.columns)
        ours = [str(cell(chain, item, row, column) or NONE) for column in item.columns]
        lines += [[*row.labels, "paper", *theirs], [*row.labels, "ours", *ours]]
    return table([*item.heads, "", *(column.head for column in item.columns)], lines)


def _curves(chain: Chain, item: Item) -> str:
    """The first and the last value of each curve."""
    rows = []
    for row in item.rows:
        for metric in item.metrics:
            points = curve(chain, row.runs, metric)
            ends = [_spread(point) for point in (points[0], points[-1])] if points else [NONE, NONE]
            rows.append([*row.labels, metric, *ends, str(len(chain.seeds(row.runs)))])
    return table([*item.heads, "metric", "first", "last", "seeds"], rows)


def _spread(point: Spread) -> str:
    return f"{point.mean:.4f} [{point.low:.4f}, {point.high:.4f}] at step {point.step}"


def _entropy(chain: Chain) -> str:
    path = chain.evaluated("start", "entropy.svg")
    return f"![entropy]({path.relative_to(chain.setting.out)})" if path.exists() else NONE


def _figure(item: Item, chains: Sequence[Chain]) -> str:
    """The figure; empty where no run has begun."""
    from megatron_refine.reproduce.drawing import ablation, over_steps  # late: matplotlib takes a second

    if item.kind == "steps":
        panels = {
            f"{chain.model}\n{metric}": {" ".join(row.labels): curve(chain, row.runs, metric) for row in item.rows}
            for metric in item.metrics for chain in chains
        }  # fmt: skip
        return over_steps(panels) if any(points for arms in panels.values() for points in arms.values()) else ""
    (column,) = item.columns
    sources = {}
    for key in dict.fromkeys(row.labels[0] for row in item.rows):
        rows = [row for row in item.rows if row.labels[0] == key]
        lines = [line for chain in chains for line in _points(chain, item, rows, column)]
        sources[f"{column.head} over {key}"] = dict(lines)
    return ablation(sources) if any(points for each in sources.values() for points in each.values()) else ""


def _points(
    chain: Chain, item: Item, rows: Sequence[Row], column: Column
) -> list[tuple[str, list[tuple[float, float]]]]:
    """(value of the parameter, score) of ours and of the paper."""
    ours = [(float(row.labels[1]), cell(chain, item, row, column)) for row in rows]
    theirs = [(float(row.labels[1]), published(item.table, chain.model, row.runs[0])) for row in rows]
    return [
        (chain.model, [(x, value.mean) for x, value in ours if value]),
        (f"{chain.model}, paper", [(x, value[0]) for x, value in theirs if value]),
    ]


def differences(setting: Setting, item: Item) -> list[str]:
    """Return in what our numbers were made otherwise than the paper's."""
    found = [f"The paper's numbers: {PAPER}."] if item.table else []
    if item.kind in ("ruler_qa", "longbench"):
        found.append("Answers are greedy and no row is dropped; the official code samples, and drops part batches.")
    if item.kind == "niah":
        found.append("Examples are of this project's RULER; the paper's are of lm-evaluation-harness.")
    found.append("Data and weights are those of the command line: the paper's mid-training data cannot be downloaded "
                 "any more.")  # fmt: skip
    if setting.examples and item.kind not in ("steps", "entropy"):
        found.append(f"At most {setting.examples} examples of each task.")
    if setting.overrides:
        found.append(f"Set by hand in every training: `{' '.join(setting.overrides)}`.")
    return found + (_tiny(setting, item) if setting.tiny else [])


def _tiny(setting: Setting, item: Item) -> list[str]:
    found = [
        "Tiny scale: this shows that the commands work, and says nothing about the paper. Models are the tiny presets, "
        f"pre-trained for a moment, then trained with `{' '.join(setting.size)}` on the sources of Python's library.",
    ]
    if item.kind == "steps":
        found.append(f"{setting.seeds} seeds of an arm at most.")
    for kind, lengths in (("niah", setting.niah), ("ruler_qa", setting.qa)):
        if item.kind == kind:
            found += [f"{there // 1024}K stands for {here} tokens." for there, here in lengths.items()]
    if item.kind in ("ruler_qa", "longbench"):
        found.append("Prompts are generated. Test-time runs answer all tasks in one run.")
    if item.kind == "short":
        found += [f"`{here}` in the place of `{there}`, generated." for there, here in setting.short.items()]
    return found


def _haystacks(chains: Sequence[Chain], item: Item) -> list[str]:
    found = [note for chain in chains for note in notes(chain, item)]
    return [f"Haystacks: {note}" for note in dict.fromkeys(found)]
