"""metrics.jsonl: one JSON object a step."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_refine.files import write

Row = dict[str, Any]

_NAMES = {
    "train": "loss ntp_loss nsp_loss answer_loss grad_norm lr clip_fraction ratio_mean optimizer_steps",
    "rollout": "reward_mean reward_std entropy_mean zero_variance_groups "
    "logprob_gap_mean logprob_gap_max masked_fraction importance_mean weight_version",
    "eval": "ntp_loss ntp_accuracy entropy reward_mean greedy_match",
    "engine": "recoveries restarts transfer_seconds guard_seconds cached_fraction",
    "perf": "tokens_per_sec mfu peak_memory_bytes",
    "time": "score select rollout rescore reward update answer sync checkpoint step",
}
KEYS = frozenset(f"{group}/{name}" for group, names in _NAMES.items() for name in names.split()) | {
    "step",
    "consumed_samples",
    "attempt",
}
STAGES = tuple(name for name in _NAMES["time"].split() if name != "step")


class MetricsLog:
    """Appends rows to a file. Each leaves the process at once: when killed, it leaves at most a torn last line."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", buffering=1, encoding="utf-8")

    def append(self, row: Mapping[str, float | int | None]) -> None:
        """Write one step. Keys: of KEYS, `step` among them, or task/<task>. Numbers that are not finite become null."""
        unknown = [key for key in row.keys() - KEYS if not key.startswith("task/")]
        assert "step" in row and not unknown, unknown or "no step"
        finite = {key: value if value is not None and math.isfinite(value) else None for key, value in row.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")

    def truncate_after(self, step: int) -> None:
        """Drop the rows after `step` and a torn last line: what a resumed run will write again. Atomic."""
        self._file.close()
        write(self.path, "".join(json.dumps(row) + "\n" for row in _rows(self.path) if row["step"] <= step))
        self._file = self.path.open("a", buffering=1, encoding="utf-8")

    def close(self) -> None:
        self._file.close()


def read(path: str | Path) -> list[Row]:
    """The rows of a metrics.jsonl, [] without one. A torn last line is left out.

    Raises ValueError where another line is not a JSON object with a step.
    """
    return list(_rows(Path(path)))


def _rows(path: Path) -> Iterator[Row]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if line.endswith("\n"):  # a line without its end may be cut in the middle of a number
                row["step"] + 0
                yield row
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise ValueError(f"{path}:{number}: not a row of metrics; remove this line") from None
