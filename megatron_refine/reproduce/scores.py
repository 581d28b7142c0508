"""What came out of the runs of an item: scores of evaluations and answers, curves of training."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_refine.eval.results import SCORES
from megatron_refine.files import TornError, read_json, read_rows
from megatron_refine.report import metrics
from megatron_refine.reproduce.chain import Chain, answered, scores_in
from megatron_refine.reproduce.items import RUNS, Column, Item, Row

POINTS = {"perplexity", "word_perplexity"}  # metrics that are no share


@dataclass(frozen=True)
class Value:
    """A number as the paper prints it (shares in percent); its standard error and n where it has them."""

    mean: float
    error: float | None = None
    n: int | None = None

    def __str__(self) -> str:
        error = "" if self.error is None else f" ± {self.error:.1f}"
        return f"{self.mean:.1f}{error}" + ("" if self.n is None else f" (n {self.n})")


@dataclass(frozen=True)
class Spread:
    """Mean, least and largest of several seeds at a step."""

    step: int
    mean: float
    low: float
    high: float


def cell(chain: Chain, item: Item, row: Row, column: Column) -> Value | None:
    """Return the mean over the column's labels; None where a score is missing."""
    found = [score(chain, item.kind, row.runs[0], label) for label in column.labels]
    if None in found:
        return None
    if len(found) == 1:
        return found[0]
    return Value(sum(value.mean for value in found if value) / len(found))


def score(chain: Chain, kind: str, run: str, label: str) -> Value | None:
    """Return a run's score of a task (at a length of the paper, `task@4096`)."""
    if kind == "short":
        return _harness(chain, run, label)
    task, _, paper = label.partition("@")
    lengths = chain.setting.niah if kind == "niah" else chain.setting.qa
    length = lengths.get(int(paper)) if paper else None
    if paper and length is None:
        return None
    if run in RUNS and RUNS[run].phase == "testtime":
        return _answers(chain, kind, run, label)
    name = label.replace("@", "_") if kind == "ruler_qa" else kind
    found = scores_in(chain.evaluated(run, name) / SCORES).get(task if length is None else f"{task}@{length}")
    return Value(100 * found["mean"], 100 * found["error"], int(found["n"])) if found else None


def _answers(chain: Chain, kind: str, run: str, label: str) -> Value | None:
    """The mean over the answers of a finished test-time run."""
    task = label.partition("@")[0]
    for part in chain.parts(run, kind):
        if part not in (label, "longbench"):
            continue
        folder = chain.place(run, part)
        rows = read_rows(folder / "predictions.jsonl") if answered(folder) else []
        scored = [100 * row["score"] for row in rows if row["task"] == task]
        if scored:
            error = statistics.stdev(scored) / math.sqrt(len(scored)) if len(scored) > 1 else 0.0
            return Value(statistics.fmean(scored), error, len(scored))
    return None


def _harness(chain: Chain, run: str, label: str) -> Value | None:
    """A metric of lm-evaluation-harness."""
    try:
        results = read_json(chain.evaluated(run, "lm_eval.json"))
        task, metric = chain.short((label,))[0].split()
        found = results["results"][task]
        mean, error = found[f"{metric},none"], found.get(f"{metric}_stderr,none")
        factor = 1 if metric in POINTS else 100
        known = factor * error if isinstance(error, float) else None
        return Value(factor * mean, known, results["n-samples"][task]["effective"])
    except (OSError, TornError, KeyError, IndexError):
        return None


def curve(chain: Chain, runs: Sequence[str], key: str) -> list[Spread]:
    """Return a metric of training over the steps that all runs of an arm have; [] where one has not begun."""
    found = [metrics.read(chain.place(run) / metrics.METRICS) for run in chain.seeds(tuple(runs))]
    at = metrics.by_step(found, key)
    return [Spread(step, sum(each) / len(each), min(each), max(each)) for step, each in at.items()]


def notes(chain: Chain, item: Item) -> list[str]:
    """Return what evaluations say of their examples, such as the text that hides the needles."""
    found = []
    for row in item.rows:
        scores = scores_in(chain.evaluated(row.runs[0], item.kind) / SCORES)
        found += [str(score["note"]) for score in scores.values() if "note" in score]
    return list(dict.fromkeys(found))
