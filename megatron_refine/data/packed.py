"""Packed rows, opened for reading: checked against their record first, then memory-mapped."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_refine.config import ConfigError
from megatron_refine.data.packing import Record
from megatron_refine.files import digest
from megatron_refine.records import Batch

_HASHED_BELOW = 1 << 30  # bytes; a second of reading at most, larger files are checked by size alone


class PackedRows:
    """The rows of one side, in the order they were packed.

    Raises ConfigError naming the file where one is missing, truncated or damaged, and where a token id is not below
    `vocab_size`.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self.files = [Path(f"{prefix}{suffix}") for suffix in (".bin", ".idx", ".json")]
        bin_path, idx_path, json_path = self.files
        self.record = _read_record(json_path)
        _check_file(bin_path, self.record.bin_bytes, self.record.bin_sha256)
        _check_file(idx_path, self.record.idx_bytes, self.record.idx_sha256)
        if self.record.max_token_id >= vocab_size:
            raise ConfigError(
                f"{bin_path}: holds token id {self.record.max_token_id}, but model.vocab_size={vocab_size} allows "
                f"{vocab_size - 1} at most; set model.vocab_size={self.record.max_token_id + 1} or more"
            )
        from megatron.core.datasets.indexed_dataset import IndexedDataset  # late: takes seconds

        self._rows = IndexedDataset(str(prefix))

    def __len__(self) -> int:
        return self.record.rows

    @property
    def seq_length(self) -> int:
        """T: tokens of a full row."""
        return self.record.seq_length

    @property
    def fingerprint(self) -> str:
        """Hash of the configuration, the corpus and the tokenizer the rows come from."""
        return self.record.fingerprint

    def row(self, index: int) -> np.ndarray:
        """Return the token ids of one row: [length <= T], uint16 or int32, without padding."""
        return np.array(self._rows[int(index)])  # a copy: a view would not outlive the map

    def batch(self, ids: Sequence[int] | np.ndarray, sample_ids: Sequence[int] | np.ndarray) -> Batch:
        """Return the rows `ids` [B] as tokens [B, T], right-padded with 0.

        sample_ids: [B], their places in the run's stream of samples.
        """
        assert len(ids) == len(sample_ids), (len(ids), len(sample_ids))
        tokens = np.zeros((len(ids), self.seq_length), np.int64)
        lengths = np.zeros(len(ids), np.int64)
        for b, index in enumerate(ids):
            row = self.row(index)
            tokens[b, : len(row)], lengths[b] = row, len(row)
        return Batch(torch.from_numpy(tokens), torch.from_numpy(lengths), torch.tensor(np.array(sample_ids, np.int64)))


def _read_record(path: Path) -> Record:
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror})") from None
    except (ValueError, TypeError):
        raise _damaged(path, "is damaged") from None


def _check_file(path: Path, size: int, sha256: str) -> None:
    try:
        found = path.stat().st_size
        intact = found == size and (size >= _HASHED_BELOW or digest(path) == sha256)
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror})") from None
    if found != size:
        raise _damaged(path, f"has {found} bytes, but its record says {size}")
    if not intact:
        raise _damaged(path, "is damaged: its content does not have the recorded sha256")


def _damaged(path: Path, problem: str) -> ConfigError:
    return ConfigError(f"{path}: {problem}; delete the folder {path.parent} and run again")
