"""Documents of one file: UTF-8 text (the whole file is one document), jsonl or parquet (a row is one)."""

import glob
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_refine.config import ConfigError

TABLES = {".jsonl": "json", ".parquet": "parquet"}  # suffix -> reader of the `datasets` library
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


def _read_table(path: Path, column: str, key: str) -> Iterator[str]:
    with reading(path, key):
        if path.stat().st_size == 0 and path.suffix == ".jsonl":
            return  # no lines, no documents: the library stumbles over it
    for number, record in enumerate(_records(path, key), 1):
        if column not in record:
            raise ConfigError(
                f"data.text_column={column}: {path} ({key}) has no such column; it has {', '.join(map(str, record))}"
            )
        text = record[column]
        if not isinstance(text, str):
            found = "nothing (null or missing)" if text is None else type(text).__name__
            raise ConfigError(
                f"data.text_column={column}: {path} ({key}): row {number} holds {found}, not text; "
                "fix the row or name another column"
            )
        yield text


def _records(path: Path, key: str) -> Iterator[dict[str, Any]]:
    """Rows of a table, streamed: nothing is copied to disk."""
    import datasets  # late: takes seconds
    import pyarrow

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # failures come as exceptions, told in one line below
    options = {"batch_size": _PARQUET_ROWS} if path.suffix == ".parquet" else {}
    with reading(path, key), tempfile.TemporaryDirectory() as scratch:
        try:
            yield from datasets.load_dataset(
                TABLES[path.suffix],
                data_files=glob.escape(str(path.absolute())),
                split="train",
                streaming=True,
                cache_dir=scratch,  # only lock files, yet the default folder may not be writable
                **options,
            )
        except (ValueError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
            reason = (_bad_line(path) if path.suffix == ".jsonl" else None) or " ".join(str(error).split())
            raise ConfigError(
                f"{key}: {path}: broken {path.suffix[1:]} file: {reason}; repair it or leave it out"
            ) from None


def _bad_line(path: Path) -> str | None:
    """Where a jsonl file breaks: its readers count rows within a block only."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                json.loads(line) if line.strip() else None
            except ValueError as error:
                return f"line {number}: {error}"
    return None
