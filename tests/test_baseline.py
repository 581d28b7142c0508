"""Baselines of benchmarks: what is written, what is compared, and what is refused. No test here looks at a clock."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_refine.bench import baseline
from megatron_refine.bench.baseline import Record, differences, outside, settings, spelled
from megatron_refine.bench.step import ratios
from megatron_refine.bench.timing import Timings
from megatron_refine.config import Config, ConfigError, load
from megatron_refine.models.family import FAMILIES

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs/baselines/step.json"
TODAY = {"seconds": {"fused / NTP": 1.2, "two-pass / NTP": 1.5}, "saved bytes": {"fused / NTP": 1.02}}


def quickstart(*overrides: str) -> Config:
    return load(ROOT / "configs/quickstart.yaml", [*overrides], FAMILIES)


def written(path: Path, config: Config, **ratios: float) -> Path:
    """A file of these ratios of seconds beside those of TODAY."""
    Record("megatron-refine bench step", config, 2, out=path).keep({**TODAY, "seconds": TODAY["seconds"] | ratios}, 12)
    return path


def test_what_is_written(tmp_path: Path) -> None:
    found = json.loads(written(tmp_path / "step.json", quickstart()).read_text(encoding="utf-8"))
    assert found["ratios"] == TODAY and found["tolerance"] == baseline.TOLERANCE
    assert found["ranks"] == 2 and found["rounds"] == 12 and found["command"] == "megatron-refine bench step"
    assert found["settings"]["parallel"]["tp"] == 2 and found["settings"]["data"] == {"seq_length": 1024}
    assert {"python", "torch", "megatron_refine", "megatron-core"} <= found["versions"].keys()
    assert "core" in found["machine"] or " x " in found["machine"]


@pytest.mark.parametrize(
    ("today", "lines"),
    [
        (TODAY, []),
        ({"seconds": {"fused / NTP": 1.37, "two-pass / NTP": 1.28}, "saved bytes": {"fused / NTP": 1.03}}, []),
        (
            {"seconds": {"fused / NTP": 1.5, "two-pass / NTP": 1.2, "new / NTP": 9.0}, "saved bytes": {}},
            [
                "fused / NTP, seconds: 1.500, 25.0% above 1.200; 15.0% are allowed",
                "two-pass / NTP, seconds: 1.200, 20.0% below 1.500; 15.0% are allowed",
                "fused / NTP, saved bytes: not measured today; the file has 1.020",
            ],
        ),
    ],
)
def test_a_line_for_each_ratio_outside(today: Any, lines: list[str]) -> None:
    kept = {"ratios": TODAY, "tolerance": {"seconds": 0.15, "saved bytes": 0.01}}
    assert outside(today, kept) == lines


def test_a_check_reads_the_file_before_and_compares_after(tmp_path: Path) -> None:
    path = written(tmp_path / "step.json", quickstart(), **{"fused / NTP": 2.0})
    record = Record("megatron-refine bench step", quickstart(), 2, check=path)
    record.keep(TODAY, 3)
    assert record.outside == [f"{path}: fused / NTP, seconds: 1.200, 40.0% below 2.000; 15.0% are allowed"]
    record = Record("megatron-refine bench step", quickstart(), 2, out=path, check=path)  # measured anew and compared
    record.keep(TODAY, 3)
    assert len(record.outside) == 1 and json.loads(path.read_text(encoding="utf-8"))["ratios"] == TODAY


def test_other_settings_are_not_compared(tmp_path: Path) -> None:
    path = written(tmp_path / "step.json", quickstart())
    with pytest.raises(ConfigError) as error:
        Record("", quickstart("model.hidden_size=256", "refine.num_rollouts=4"), 4, check=path)
    assert str(error.value).splitlines() == [
        f"--check={path}: measured with ranks=2, not 4",
        f"--check={path}: measured with model.hidden_size=128, not 256",
        f"--check={path}: measured with refine.num_rollouts=1, not 4",
    ]
    Record("", quickstart("run.dir=elsewhere", "run.seed=7", "optimizer.lr=1"), 2, check=path)  # do not matter


def test_a_key_that_is_new_since_then_is_no_difference() -> None:
    today = {"ranks": 2, "settings": {"model": {"width": 4, "new": 1}}}
    assert differences(today, {"ranks": 2, "settings": {"model": {"width": 4}}}) == []
    assert differences({"ranks": 2, "settings": {}}, today) == ["model.width=4, not None", "model.new=1, not None"]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"ratios": {}}',
     '{"ratios": {"seconds": {"a": "1"}}, "tolerance": {"seconds": 1}, "settings": {"a": 1}}',
     '{"ratios": {"seconds": {"a": 0}}, "tolerance": {"seconds": 1}, "settings": {"a": 1}}',
     '{"ratios": {"seconds": {"a": 1}}, "tolerance": {}, "settings": {"a": 1}}'],
)  # fmt: skip
def test_a_file_without_ratios_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"--check=.*a\.json: holds no ratios of a benchmark"):
        Record("", quickstart(), 2, check=path)


def test_files_that_cannot_be_used_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--check=.*: No such file or directory; name a file that --json wrote"):
        Record("", quickstart(), 2, check=tmp_path / "none.json")
    for path in (tmp_path, tmp_path / "none/a.json"):
        with pytest.raises(ConfigError, match="--json=.*: cannot be written; name a file in a folder that exists"):
            Record("", quickstart(), 2, out=path)


def test_the_command_is_kept_without_its_files() -> None:
    given = ["step", "--config", "a b.yaml", "--json", "x.json", "--rounds", "7", "--check=y.json", "run.seed=1"]
    assert spelled(given) == "megatron-refine bench step --config 'a b.yaml' --rounds 7 run.seed=1"


def test_the_ratios_of_a_step() -> None:
    timings = Timings({kind: int for kind in ("NTP", "fused", "official")}, 0)
    timings.seconds.update({"NTP": [1.0, 2.0, 4.0], "fused": [2.0, 3.0, 4.0], "official": [8.0, 9.0, 20.0]})
    assert ratios(timings, {"NTP": 100, "fused": 110}) == {
        "seconds": {"fused / NTP": 1.5, "official / NTP": 5.0, "official / fused": 4.0},
        "saved bytes": {"fused / NTP": 1.1},
    }


def test_the_file_in_the_documentation_is_that_of_the_quickstart() -> None:
    """Where the quickstart changes: make bench ARGS="--json docs/baselines/step.json"."""
    kept = baseline.load(KEPT)
    assert differences({"ranks": 2, "settings": settings(quickstart())}, kept) == []
    assert {"fused / NTP", "two-pass / NTP"} == kept["ratios"]["seconds"].keys() == kept["ratios"]["saved bytes"].keys()
    assert kept["rounds"] >= 12 and not kept["commit"].endswith("-dirty")
