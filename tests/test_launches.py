"""What steps launch on a GPU, counted without one: budgets, which a change may lower; reads of values by the host."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_refine.bench.launches.counter import BLOCKS, ELEMENTS, moved, packed

ROOT = Path(__file__).parents[1]
FULL = ["data.seq_length=16384", "train.precision=bf16"]
# (model and overrides) -> of an NTP step launches and TB, of all kinds the time divided by that of an NTP step
BUDGETS: list[Any] = []


def counted(*overrides: str) -> Any:
    """What `bench launches --json` prints."""
    line = ["-m", "megatron_refine", "bench", "launches", "--config", "configs/bench.yaml", *overrides, "--json"]
    done = subprocess.run([sys.executable, *line], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_an_operator_on_lists_fills_its_kernels() -> None:
    assert packed([1] * 110, 110) == 1 and packed([1] * 111, 110) == 2
    assert packed([ELEMENTS * BLOCKS], 36) == 1 and packed([ELEMENTS * BLOCKS + 1], 36) == 2
    assert packed([ELEMENTS * BLOCKS * 2, 1], 36) == 3


def test_what_is_broadcast_moves_once() -> None:
    row = torch.ones(1, 8)
    assert moved([row.expand(100, 8), [row]]) == 2 * 8 * 4
