"""Documents of one file: UTF-8 text (the whole file is one document), jsonl or parquet (a row is one)."""

import glob
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_refine.config import ConfigError

TABLES = (".jsonl", ".parquet")  # suffixes of files of which a row is a document or an example
_PARQUET_ROWS = 64  # rows decoded at once: documents are long, and a file's own row groups may hold thousands


@contextmanager
def reading(path: Path, key: str) -> Iterator[None]:
    """Turn a failure of the file system into one line naming the file and the key that named it."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise ConfigError(f"{key}: {path}: cannot be read: {reason}; check its permissions or leave it out") from None


def read_documents(path: Path, column: str, key: str) -> Iterator[str]:
    """The documents of `path` in file order. Raises ConfigError naming the file, and the row or line where it can."""
    if path.suffix in TABLES:
        yield from _read_table(path, column, key)
    else:
        yield _read_text(path, key)


def _read_text(path: Path, key: str) -> str:
    with reading(path, key):
        content = path.read_bytes()
    try:
        return content.decode()  # not read_text: line ends stay what they are
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{key}: {path}: not UTF-8 text (byte {error.start}); convert it, or leave it out "
            f"(tables are known by their names, {' and '.join(TABLES)})"
        ) from None


def read_rows(path: Path, key: str) -> Iterator[dict[str, Any]]:
    """Rows of a .jsonl or .parquet file in file order, streamed: column -> value, whatever its type.

    Values come as they stand in the file, odd characters too. Raises ConfigError naming the file and, in jsonl, the
    line, for an unknown suffix and for a file that is broken or cannot be read.
    """
    if path.suffix not in TABLES:
        raise ConfigError(
            f"{key}: {path}: no table (known by their names: {' and '.join(TABLES)}); convert or rename it"
        )
    yield from _jsonl_rows(path, key) if path.suffix == ".jsonl" else _parquet_rows(path, key)


def flaw(value: object) -> str:
    """What a cell holds instead of text that has an encoding; "" where nothing is wrong."""
    if value is None:
        return "nothing (null or missing)"
    if not isinstance(value, str):
        return f"{type(value).__name__}, not text"
    try:
        value.encode()
    except UnicodeEncodeError as error:  # jsonl can escape half a pair, no tokenizer takes it
        return f"half a surrogate pair at character {error.start}, not text"
    return ""


def _read_table(path: Path, column: str, key: str) -> Iterator[str]:
    for number, row in enumerate(read_rows(path, key), 1):
        if column not in row:
            raise ConfigError(
                f"data.text_column={column}: {path} ({key}): row {number} has no such column; it has "
                f"{', '.join(map(str, row))}"
            )
        if found := flaw(row[column]):
            raise ConfigError(
                f"data.text_column={column}: {path} ({key}): row {number} holds {found}; "
                "fix the row or name another column"
            )
        yield row[column]


def _jsonl_rows(path: Path, key: str) -> Iterator[dict[str, Any]]:
    """Not through `datasets`: it turns text that looks like dates into dates, and drops half surrogate pairs."""
    with reading(path, key), path.open("rb") as lines:  # bytes: only b"\n" ends a line, U+2028 does not
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                if not isinstance(row, dict):
                    raise ValueError(f"{type(row).__name__}, not an object")
            except ValueError as error:
                reason = f"line {number}: {error}"
                raise ConfigError(f"{key}: {path}: broken jsonl file: {reason}; repair it or leave it out") from None
            yield row


def _parquet_rows(path: Path, key: str) -> Iterator[dict[str, Any]]:
    """Nothing is copied to disk."""
    import datasets  # late: takes seconds
    import pyarrow

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # failures come as exceptions, told in one line below
    with reading(path, key), tempfile.TemporaryDirectory() as scratch:
        try:
            yield from datasets.load_dataset(
                "parquet",
                data_files=glob.escape(str(path.absolute())),
                split="train",
                streaming=True,
                cache_dir=scratch,  # only lock files, yet the default folder may not be writable
                batch_size=_PARQUET_ROWS,
            )
        except (ValueError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"{key}: {path}: broken parquet file: {reason}; repair it or leave it out") from None
