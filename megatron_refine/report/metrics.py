"""metrics.jsonl: one JSON object a step."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_refine.files import Appended, TornError, read_rows, write_rows

Row = dict[str, Any]
METRICS = "metrics.jsonl"

_NAMES = {
    "train": "loss ntp_loss nsp_loss answer_loss grad_norm lr clip_fraction ratio_mean optimizer_steps",
    "rollout": "reward_mean reward_std cosine_mean binary_mean hybrid_mean entropy_mean zero_variance_groups "
    "logprob_gap_mean logprob_gap_max masked_fraction importance_mean weight_version",
    "eval": "ntp_loss ntp_accuracy sampled_accuracy entropy reward_mean greedy_match",
    "engine": "recoveries restarts transfer_seconds guard_seconds prompt_tokens cached_tokens computed_tokens "
    "offloaded_bytes",
    "perf": "tokens_per_sec mfu peak_memory_bytes",
    "time": "score select offload rollout rescore reward update answer sync checkpoint step",
}
KEYS = frozenset(f"{group}/{name}" for group, names in _NAMES.items() for name in names.split()) | {
    "step",
    "consumed_samples",
    "attempt",
    "wall",  # unix time, s
}
STAGES = tuple(name for name in _NAMES["time"].split() if name != "step")


class MetricsLog:
    """The file of rows. Each row leaves the process at once: when killed, it leaves at most a torn last line."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file = Appended(self.path)

    def append(self, row: Mapping[str, float | int | None]) -> None:
        """Write one step. Keys: of KEYS, `step` among them, or task/<task>. Numbers that are not finite become null."""
        unknown = [key for key in row.keys() - KEYS if not key.startswith("task/")]
        assert "step" in row and not unknown, unknown or "no step"
        finite = {key: value if value is not None and math.isfinite(value) else None for key, value in row.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")

    def truncate_after(self, step: int) -> None:
        """Drop the rows after `step` and a torn last line: what a resumed run will write again. Atomic."""
        self._file.close()
        write_rows(self.path, [row for row in read(self.path) if row["step"] <= step])
        self._file = Appended(self.path)

    def close(self) -> None:
        self._file.close()


def read(path: str | Path) -> list[Row]:
    """Read the rows of a metrics.jsonl, [] without one. A torn last line is left out.

    Raises OSError, and TornError where another line is not a JSON object with a step.
    """
    rows = read_rows(Path(path))
    for row in rows:
        if not isinstance(row.get("step"), int | float):
            raise TornError(f"{path}: damaged: {str(row)[:80]} is not a row of metrics; remove this line")
    return rows


def by_step(runs: Sequence[Sequence[Row]], key: str) -> dict[int, list[float]]:
    """Return the values of `key` of all runs, by step: at the steps where all of them have one, in order."""
    found = [{row["step"]: row[key] for row in rows if row.get(key) is not None} for rows in runs]
    steps = sorted(set.intersection(*map(set, found)))
    return {step: [values[step] for values in found] for step in steps}
