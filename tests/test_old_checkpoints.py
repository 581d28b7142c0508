"""Checkpoints that an older commit's code has written load as they are, and the run goes on as it did there."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.parity import small_config
from tests.test_checkpoint import loaded_saved_continued
from tests.zygote import Zygote

OLD = Path(__file__).parent / "golden/checkpoints_747789e"


@pytest.mark.parametrize(
    ("name", "world", "overrides"),
    [
        ("gated_delta_net", 2, ["parallel.tp=2"]),  # as it was written
        ("gated_delta_net", 2, ["parallel.pp=2"]),
        ("lact", 1, []),  # as it was written
        ("lact", 2, ["parallel.tp=2", "parallel.sp=true"]),
    ],
)
def test_a_run_goes_on(ranks: Zygote, tmp_path: Path, name: str, world: int, overrides: list[str]) -> None:
    """Two steps were made there; the third is the one that followed there."""
    expected: dict[str, Any] = json.loads((OLD / f"{name}.json").read_text(encoding="utf-8"))
    config = small_config(tmp_path, *overrides, model=expected["model"])
    for metrics, counters, progress in ranks(world, loaded_saved_continued, config=config, source=OLD / name):
        assert counters == set(expected["adam"]) and progress == {"step": 2, "consumed_samples": 8, "data": "rows"}
        for key, value in expected["metrics"].items():  # fp32 sums in another order
            assert metrics[key] == pytest.approx(value, rel=1e-5), key
