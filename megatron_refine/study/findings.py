"""Differences between the arms of a study, paired over its bases. Pure functions.

A base is the unit: its continuations are averaged before anything is compared. Intervals are Student's. p-values are
those of the exact sign-flip test (one-sided, at least 2^-n with n bases), corrected by Holm's method where several are
asked at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import sqrt
from statistics import fmean, stdev

from megatron_refine.report.metrics import Row
from megatron_refine.study.plan import Contrast, Metric, Run

KEYS: dict[Metric, str] = {
    "reward": "eval/reward_mean",
    "greedy match": "eval/greedy_match",
    "recall": "task/valid",
    "accuracy": "eval/ntp_accuracy",
    "sampled accuracy": "eval/sampled_accuracy",
    "loss": "eval/ntp_loss",
    "entropy": "eval/entropy",
}
REWARD, CONTROL = "binary", "megatron_refine.study.rewards:shuffled"  # the mean of the control's is that of the reward
# Student's t, 97.5 %, by degrees of freedom (any table of it)
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201)

Values = Mapping[Metric, float]
Ends = Sequence[tuple[Run, Row, Row]]  # a run, its first and its last evaluation


@dataclass(frozen=True)
class Difference:
    """Holds how two arms differ in a metric: the mean over bases, half of its 95 % interval, p of a mean above 0."""

    mean: float
    half: float
    p: float
    n: int

    @classmethod
    def of(cls, differences: Sequence[float]) -> "Difference":
        n, mean = len(differences), fmean(differences)
        half = T[min(n - 2, len(T) - 1)] * stdev(differences) / sqrt(n) if n > 1 else float("inf")
        return cls(mean, half, sign_flip(differences), n)

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


def sign_flip(differences: Sequence[float]) -> float:
    """Return the share of all choices of signs whose sum is at least that of the differences."""
    total = sum(differences)
    signs = product((1, -1), repeat=len(differences))
    sums = [sum(sign * x for sign, x in zip(chosen, differences, strict=True)) for chosen in signs]
    return sum(x >= total - 1e-12 * max(map(abs, differences)) for x in sums) / len(sums)


def holm(ps: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm 1979), in the order given."""
    found, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        found[i] = largest
    return found


def values(run: Run, row: Row) -> dict[Metric, float]:
    """Return what an evaluation of a run says. A reward of another kind than the study's is left out."""
    found = {metric: row[key] for metric, key in KEYS.items() if row.get(key) is not None}
    if run.keys.get("refine.reward", REWARD) not in (REWARD, CONTROL):
        found.pop("reward", None)
    return found


def differences(ends: Ends, model: str, contrast: Contrast) -> dict[Metric, Difference]:
    """Return those of the metrics that both arms have, over the bases and seeds that both have."""
    pairs: dict[int, list[tuple[Values, Values]]] = {}
    found = {(run.base, run.seed, run.arm): values(run, last) for run, _, last in ends if run.model == model}
    for base, seed in sorted({(base, seed) for base, seed, _ in found}):
        arm, against = found.get((base, seed, contrast.arm)), found.get((base, seed, contrast.against))
        if arm and against:
            pairs.setdefault(base, []).append((arm, against))
    every = [both for seeds in pairs.values() for both in seeds]
    shared = [metric for metric in KEYS if every and all(metric in x and metric in y for x, y in every)]
    return {
        metric: Difference.of([fmean(x[metric] - y[metric] for x, y in seeds) for seeds in pairs.values()])
        for metric in shared
    }


def no_worse(difference: Difference, margin: float) -> bool:
    """Tell whether the whole interval lies on the good side of the margin: above one below 0, below one above 0."""
    return difference.low > margin if margin < 0 else difference.high < margin
