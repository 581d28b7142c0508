"""Tables and packed files that look like something else: none is taken for prose, and nothing is left out silently."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_refine.config import ConfigError
from megatron_refine.data.readers import read_documents, read_rows
from tests.test_input import LINES, ROWS, TEXTS, failure, put, read

PRETTY = b"".join(json.dumps(row, indent=2).encode() for row in ROWS)
REFUSED = {  # name -> content, words of the line
    "table.csv.gz": (gzip.compress(b"id,text\n1,a\n"), "looks like a table"),
    "table.CSV.bz2": (bz2.compress(b"id,text\n1,a\n"), "looks like a table"),
    "table.tab": (b"id\ttext\n1\ta\n", "looks like a table"),
    "bars.csv": (b"id|text\n1|a\n", "looks like a table"),
    "excel.csv": (b"sep=;\r\nid;text\r\n1;a\r\n", "looks like a table"),
    "blank.csv": (b"\n\nid,text\n1,a\n", "looks like a table"),
    "pretty.txt": (PRETTY, "looks like JSON objects, not like one document; name it .json"),
    "pretty.log.gz": (gzip.compress(json.dumps(ROWS[0], indent=2).encode()), "looks like JSON objects"),
    "twice.jsonl": (b'{"text": "a", "text": "b"}\n', "line 1: the key 'text' stands twice in an object; repair it"),
    "twice.json": (b'[{"text": "a"},\n{"text": "b", "text": "c"}]', "line 2: the key 'text' stands twice"),
    "junk.txt.bz2": (bz2.compress(b"abc") + b"junk", "broken bzip2 file: "),
    "junk.txt.xz": (lzma.compress(b"abc") + b"junk", "broken xz file: "),
    "second.txt.bz2": (bz2.compress(b"abc") + bz2.compress(b"def")[:-9], "broken bzip2 file: "),
    "letter.rtf": (b"{\\rtf1\\ansi hello}", "is an RTF document; convert it to text"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_looks_like_something_else_is_named(tmp_path: Path, name: str) -> None:
    content, words = REFUSED[name]
    message = failure(put(tmp_path, (name, content)))
    assert str(tmp_path / name) in message and words in message, message


@pytest.mark.parametrize(("name", "content"), [
    ("a.jsonl.bz2", bz2.compress(LINES[:30]) + bz2.compress(b"") + bz2.compress(LINES[30:])),
    ("a.jsonl.xz", lzma.compress(LINES[:30]) + bytes(8) + lzma.compress(LINES[30:]) + bytes(4)),
    ("a.jsonl", LINES.replace(b'"id": 0', b'"id": {"x": 1, "x": 2}')),
], ids=["bzip2", "xz", "within a value"])  # fmt: skip
def test_streams_one_after_another_are_one_file(tmp_path: Path, name: str, content: bytes) -> None:
    assert read(put(tmp_path, (name, content)) / name) == TEXTS


@pytest.mark.parametrize("packer", [bz2, lzma], ids=["bzip2", "xz"])
def test_long_streams_are_read_in_pieces(tmp_path: Path, packer: Any) -> None:
    """Longer than what is read at once, packed and unpacked."""
    text = "".join(f"{i * i * 7919 % 104729:x} " for i in range(60_000)) + "a" * 400_000
    suffix = "bz2" if packer is bz2 else "xz"
    packed = packer.compress(text[:90_000].encode()) + packer.compress(text[90_000:].encode())
    assert read(put(tmp_path, (f"a.txt.{suffix}", packed)) / f"a.txt.{suffix}") == [text]


def test_a_column_that_nobody_asked_for_breaks_nothing(tmp_path: Path) -> None:
    """Times that Python cannot hold, beside a text."""
    path = tmp_path / "times.parquet"
    times = pyarrow.array([2**62, -(2**62)], pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "when": times}), path)
    assert list(read_documents(path, "text", "data.paths")) == ["a", "b"]
    with pytest.raises(ConfigError, match="no such column; it has text, when: name one of these"):
        list(read_documents(path, "body", "data.paths"))
    with pytest.raises(ConfigError, match=r"times\.parquet"):
        list(read_rows(path, "task.paths"))
