"""What steps launch on a GPU, counted without one: budgets, which a change may lower; waits of the host for values."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_refine.bench.launches.counter import BLOCKS, ELEMENTS, moved, packed
from tests.lanes import short

ROOT = Path(__file__).parents[1]
LARGE, SHORTER, EIGHT = ["data.seq_length=16384"], ["data.seq_length=4096"], "refine.num_rollouts=8"
# overrides; most launches and GB of an NTP step's passes, least MFU; most that a fused and a two-pass step take of an
# NTP step's time; shares and times by the roofline, then kernel by kernel
BUDGETS: list[tuple[list[str], tuple[int, float, float, float], tuple[float, float, float, float]]] = [
    (["model=delta_net_1.3b", *LARGE], (1_500, 124, 0.505, 0.46), (1.04, 1.385, 1.06, 1.40)),
    (["model=lact_760m", *SHORTER], (4_300, 54.5, 0.417, 0.415), (1.19, 1.53, 1.35, 1.70)),
    (["model=gated_delta_net_1.3b", *SHORTER, EIGHT], (1_500, 33.5, 0.50, 0.453), (1.40, 1.79, 1.72, 2.15)),
    ([], (320, 0.7, 0.0, 0.0), (4.5, 4.8, 4.5, 4.8)),  # a small one, whose time is that of its launches
]


def counted(*overrides: str) -> Any:
    """What `bench launches --json` prints."""
    given = ["--config", "configs/bench.yaml", "train.precision=bf16", *overrides]
    return child("megatron_refine", "bench", "launches", *given, "--json")


def child(*line: str) -> Any:
    """The JSON that a module prints in a process of its own: there is no way back from pretending to have a GPU."""
    done = subprocess.run([sys.executable, "-m", *line], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("overrides", "ntp", "ratios"), short(BUDGETS, lambda overrides, ntp, ratios: not overrides))
def test_a_step_stays_within_its_budget(overrides: list[str], ntp: Any, ratios: Any) -> None:
    """And the host waits at most four times for the device: for positions, for an update's sums, for metrics."""
    found = counted(*overrides)
    launches, size, *shares = ntp
    assert found["ntp"]["launches"] <= launches and found["ntp"]["bytes"] <= size * 1e9, found
    for name, least in zip(("mfu", "kernels_mfu"), shares, strict=True):
        assert found["ntp"][name] >= least, found
    bounds = [(bound, kind) for bound in ("roofline_seconds", "kernels_seconds") for kind in ("fused", "two_pass")]
    for (bound, kind), most in zip(bounds, ratios, strict=True):
        assert found[kind][bound] <= most * found["ntp"][bound], found
    reads = {kind: each["host_reads"] for kind, each in found.items()}
    assert reads == {"ntp": 1, "fused": 3, "two_pass": 3, "update": 1}  # the update's is among those of the others


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gated_delta_net"])
def test_rollouts_ask_the_device_for_nothing(model: str) -> None:
    """Which makes them safe to record; as graphs they are a launch beside the copies of their states."""
    length = ["data.seq_length=1024", "train.precision=bf16"]
    found = child("tests.fake_gpu", "rollouts", "configs/bench.yaml", f"model={model}_tiny", *length)
    assert found["steps"]["reads"] == found["graphs"]["reads"] == []
    assert found["graphs"]["launches"] < found["steps"]["launches"] / 3


@pytest.mark.parametrize(
    ("model", "mode"),
    short(
        [(model, mode) for model in ("delta_net_tiny", "gated_delta_net_tiny") for mode in ("decode", "extend")],
        lambda model, mode: "gated" in model and mode == "extend",
    ),
)
def test_the_served_models_ask_the_device_for_nothing(model: str, mode: str) -> None:
    found = child("tests.fake_gpu", "served", mode, "configs/bench.yaml", f"model={model}")
    assert found["reads"] == [] and found["launches"] > 100


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--config", "configs/bench.yaml", "parallel.tp=2"], "launches: counts one rank; set parallel.tp=1"),
        (["--config", "configs/none.yaml"], "configs/none.yaml: cannot be read"),
    ],
)
def test_what_cannot_be_counted_is_one_line(line: list[str], message: str) -> None:
    command = [sys.executable, "-m", "megatron_refine", "bench", "launches", *line]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 2 and done.stderr.startswith(message) and done.stderr.count("\n") == 1, done.stderr


def test_an_operator_on_lists_fills_its_kernels() -> None:
    assert packed([1] * 110, 110) == 1 and packed([1] * 111, 110) == 2
    assert packed([ELEMENTS * BLOCKS], 36) == 1 and packed([ELEMENTS * BLOCKS + 1], 36) == 2
    assert packed([ELEMENTS * BLOCKS * 2, 1], 36) == 3


def test_what_is_broadcast_moves_once() -> None:
    row = torch.ones(1, 8)
    assert moved([row.expand(100, 8), [row]]) == 2 * 8 * 4
