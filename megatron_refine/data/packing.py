"""A document's rows, and their packed form: Megatron's .bin/.idx with a record of what they hold beside them."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

import numpy as np

from megatron_refine.config import Data
from megatron_refine.files import digest, write_json

SIDES = ("train", "valid")
_SHORTEST_ROW = 2  # one token to read and one to predict


@dataclass(frozen=True)
class RowRule:
    """The rule by which a document becomes rows. Lengths are in tokens and count BOS."""

    seq_length: int
    min_length: int
    split: bool
    bos: int | None

    @classmethod
    def of(cls, data: Data, bos: int | None) -> "RowRule":
        """Return the rule of a configuration for training; `bos` is the token that begins every row, or None."""
        return cls(data.seq_length, max(data.min_length or data.seq_length, _SHORTEST_ROW), data.split_documents, bos)

    def held_out(self, data: Data) -> "RowRule":
        """Return the rule for documents that are held out."""
        return replace(self, min_length=max(data.valid_min_length or self.min_length, _SHORTEST_ROW))

    def document_length(self, ids: np.ndarray) -> int:
        """Return the number of tokens of the document as one uncut row."""
        return len(ids) + (self.bos is not None)

    def rows(self, ids: np.ndarray) -> list[np.ndarray]:
        """Return the rows of a document's token ids [length], each [min_length .. seq_length]; none if it is too short.

        Without `split` there is one row, the document's head; with it the pieces of the document, one after another.
        """
        head = np.array([] if self.bos is None else [self.bos], ids.dtype)
        step = self.seq_length - len(head)
        starts = range(0, len(ids), step) if self.split else [0]
        rows = [np.concatenate([head, ids[start : start + step]]) for start in starts]
        return [row for row in rows if len(row) >= self.min_length]

    def cut(self, ids: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray, str]:
        """Cut a document of token ids [length] in two: for training, and from its end `fraction` of its rows, at least
        one, to hold out. Both give rows by `splitting`. Returns them and how many rows that are, in words; an empty
        second part where the document gives fewer than two rows.
        """
        step = self.seq_length - (self.bos is not None)
        count = len(self.splitting.rows(ids))
        held = min(max(1, round(fraction * count)), count - 1)
        at = len(ids) if count < 2 else (count - held) * step
        return ids[:at], ids[at:], f"the last {held} of its {count} rows are held out"

    @property
    def splitting(self) -> "RowRule":
        """The rule with documents cut into rows."""
        return replace(self, split=True)


@dataclass
class Record:
    """The .json beside a pair of .bin/.idx files: what they hold."""

    fingerprint: str  # of the configuration, the corpus and the tokenizer
    seq_length: int
    documents: int = 0  # read
    dropped: int = 0  # too short for a row
    longest: int = 0  # tokens of the longest document
    rows: int = 0
    tokens: int = 0  # in the rows
    max_token_id: int = -1
    bin_bytes: int = 0
    bin_sha256: str = ""
    idx_bytes: int = 0
    idx_sha256: str = ""
    note: str = ""  # what a reader of the screen must know


class RowWriter:
    """Writer of `<prefix>.bin`, `.idx` and `.json`. A context manager: the files are complete when it closes."""

    def __init__(self, prefix: Path, rule: RowRule, vocab_size: int, fingerprint: str) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder  # late: takes seconds

        self.record = Record(fingerprint, rule.seq_length)
        self._prefix, self._rule = prefix, rule
        self._builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16 if vocab_size <= 1 << 16 else np.int32)

    def add(self, ids: np.ndarray) -> None:
        """Add the rows of a document of token ids [length] int64."""
        record, rows = self.record, self._rule.rows(ids)
        record.documents += 1
        record.dropped += not rows
        record.longest = max(record.longest, self._rule.document_length(ids))
        for row in rows:
            record.rows += 1
            record.tokens += len(row)
            record.max_token_id = max(record.max_token_id, int(row.max()))
            self._builder.add_document(row, [len(row)])

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None:
            self._builder.data_file.close()
            return
        self._builder.finalize(f"{self._prefix}.idx")
        record, bin_path, idx_path = self.record, Path(f"{self._prefix}.bin"), Path(f"{self._prefix}.idx")
        record.bin_bytes, record.bin_sha256 = bin_path.stat().st_size, digest(bin_path)
        record.idx_bytes, record.idx_sha256 = idx_path.stat().st_size, digest(idx_path)
        write_json(Path(f"{self._prefix}.json"), asdict(record), indent=2)


def pack(
    documents: Iterable[tuple[str, np.ndarray]], folder: Path, rules: Mapping[str, RowRule], vocab_size: int,
    fingerprint: str, note: str = "",
) -> dict[str, Record]:  # fmt: skip
    """Write documents, pairs of a side and token ids [length], to `folder/train.*` and `folder/valid.*`, by the rule of
    each side."""
    with ExitStack() as stack:
        writers = {
            side: stack.enter_context(RowWriter(folder / side, rules[side], vocab_size, fingerprint)) for side in SIDES
        }
        writers["valid"].record.note = note
        for side, ids in documents:
            writers[side].add(ids)
    return {side: writer.record for side, writer in writers.items()}
