"""Packed files alone: what their rows hold, and damage to them."""

from pathlib import Path

import numpy as np
import pytest

from megatron_refine.config import ConfigError
from megatron_refine.data.packed import PackedRows
from megatron_refine.data.packing import SIDES, RowRule, pack


def test_token_ids_against_the_vocabulary(tmp_path: Path) -> None:
    ids = np.array([5, 70000, 1 << 16])
    pack([("train", ids), ("valid", ids)], tmp_path, dict.fromkeys(SIDES, RowRule(8, 2, False, None)), 1 << 17, "f")
    rows = PackedRows(tmp_path / "train", 70001)
    assert rows.row(0).dtype == np.int32 and rows.row(0).tolist() == ids.tolist()
    with pytest.raises(ConfigError, match=r"train\.bin: holds token id 70000, but model\.vocab_size=70000 allows"):
        PackedRows(tmp_path / "train", 70000)


def test_sixteen_bits_hold_as_many_ids_as_they_can(tmp_path: Path) -> None:
    rule = dict.fromkeys(SIDES, RowRule(8, 2, False, None))
    for size, dtype in ((1 << 16, np.uint16), ((1 << 16) + 1, np.int32)):
        (tmp_path / str(size)).mkdir()
        ids = np.array([0, size - 1])
        pack([("train", ids), ("valid", ids)], tmp_path / str(size), rule, size, "f")
        row = PackedRows(tmp_path / str(size) / "train", size).row(0)
        assert row.dtype == dtype and row.tolist() == ids.tolist()


def test_a_flipped_bit_in_megabytes_of_rows_is_seen(tmp_path: Path) -> None:
    ids = np.arange(1 << 20) % 1000
    pack([("train", ids), ("valid", ids)], tmp_path, dict.fromkeys(SIDES, RowRule(ids.size, 2, False, None)), 1000, "f")
    path = tmp_path / "train.bin"
    content = bytearray(path.read_bytes())
    content[1 << 20] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{path}: "):
        PackedRows(tmp_path / "train", 1000)
