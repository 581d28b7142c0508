"""Scores as Markdown, in the paper's layout: columns by task and length (arXiv 2602.16704, tables 1-3)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_refine.eval.suite import Score
from megatron_refine.markdown import table

_WIDE = 4  # tasks side by side


@dataclass(frozen=True)
class Scored:
    task: str
    length: int | None  # context length where the task has several
    score: Score


def markdown(model: str, scores: Sequence[Scored], heldout: Mapping[str, Score] | None = None) -> str:
    """Tables of tasks at their lengths with the average over lengths, of tasks of one length, of held-out documents.

    Scores and their standard errors are in percent; averages are over cells, unweighted, without an error of their own.
    """
    by_task: dict[str, list[Scored]] = {}
    for scored in scores:
        by_task.setdefault(scored.task, []).append(scored)
    several = [found for found in by_task.values() if found[0].length is not None]
    tables = [_lengths(model, several[i : i + _WIDE]) for i in range(0, len(several), _WIDE)]
    single = [found[0] for found in by_task.values() if found[0].length is None]
    if single:
        tables.append(_single(model, single))
    if heldout:
        cells = [f"{s.mean:.4f} ± {s.error:.4f}" if "loss" in name else str(s) for name, s in heldout.items()]
        n = next(iter(heldout.values())).n
        tables.append(table(["model", *heldout, "documents"], [[model, *cells, str(n)]]))
    return "\n\n".join(tables)


def _lengths(model: str, groups: Sequence[Sequence[Scored]]) -> str:
    heads, cells = ["model"], [model]
    for group in groups:
        found = sorted(group, key=lambda scored: scored.length or 0)
        heads += [f"{s.task} {_length(s.length or 0)}" for s in found]
        cells += [_cell(s.score) for s in found]
        if len(found) > 1:
            heads.append(f"avg of {len(found)}")
            cells.append(f"{100 * sum(s.score.mean for s in found) / len(found):.1f}")
    return table(heads, [cells])


def _single(model: str, scored: Sequence[Scored]) -> str:
    mean = 100 * sum(s.score.mean for s in scored) / len(scored)
    heads, cells = [s.task for s in scored], [_cell(s.score) for s in scored]
    return table(["model", *heads, f"avg of {len(scored)}"], [[model, *cells, f"{mean:.1f}"]])


def _cell(score: Score) -> str:
    return f"{score} (n {score.n})"


def _length(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
