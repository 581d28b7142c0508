"""What stands in a corpus is read as what it is, or refused in one line that names it."""

import bz2
import gzip
import inspect
import io
import json
import lzma
import os
import pickle
import socket
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save

from megatron_refine.config import ConfigError
from megatron_refine.data import corpus as corpus_module
from megatron_refine.data import readers
from megatron_refine.data.corpus import Corpus, find_corpus
from megatron_refine.data.examples import Columns, read_examples
from megatron_refine.eval import files
from megatron_refine.eval.tasks import TASKS

TEXTS = ["one é☃", "two\r\n", "three"]
ROWS = [{"text": text, "id": i} for i, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS, indent=1).encode()
BOM = b"\xef\xbb\xbf"
DEEP = b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"


def zstd(data: bytes) -> bytes:
    packed: bytes = pyarrow.Codec("zstd").compress(data, asbytes=True)
    return packed


def parquet(**columns: Any) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), stream)
    return stream.getvalue()


def packed(write: Callable[[Any], None]) -> bytes:
    stream = io.BytesIO()
    write(stream)
    return stream.getvalue()


def tar() -> bytes:
    def write(stream: Any) -> None:
        with tarfile.TarFile(fileobj=stream, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO(b""))

    return packed(write)


def put(folder: Path, *files: tuple[str, bytes]) -> Path:
    for name, content in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def find(*paths: Path) -> Corpus:
    return find_corpus([str(path) for path in paths], "text", "data.paths")


def read(*paths: Path) -> list[str]:
    return list(find(*paths).documents())


def failure(*paths: Path) -> str:
    """The one line with which reading fails."""
    with pytest.raises(ConfigError) as caught:
        read(*paths)
    assert "\n" not in str(caught.value)
    return str(caught.value)


PARQUET = parquet(text=TEXTS, id=[0, 1, 2])
FORMATS = {
    "a.jsonl": LINES, "a.JSONL": LINES, "a.ndjson": LINES, "a.NDJSON": LINES, "bom.jsonl": BOM + LINES,
    "lines.json": LINES, "array.json": ARRAY, "line.json": json.dumps(ROWS).encode(), "bom.json": BOM + ARRAY,
    "a.JSON": b"".join(json.dumps(row, indent=2).encode() for row in ROWS),
    "a.parquet": PARQUET, "a.Parquet": PARQUET, "a.dat": PARQUET, "parquet": PARQUET, "a.txt": PARQUET,
    "a.jsonl.gz": gzip.compress(LINES), "a.JSONL.GZ": gzip.compress(LINES), "a.json.gz": gzip.compress(BOM + ARRAY),
    "members.jsonl.gz": gzip.compress(LINES[:30]) + gzip.compress(LINES[30:]), "no_suffix.jsonl": gzip.compress(LINES),
    "a.jsonl.bz2": bz2.compress(LINES), "a.jsonl.xz": lzma.compress(LINES), "a.json.zst": zstd(ARRAY),
    "a.jsonl.zst": zstd(LINES), "frames.ndjson.zst": zstd(LINES[:30]) + zstd(b"") + zstd(LINES[30:]),
    "skipped.jsonl.zst": b"\x50\x2a\x4d\x18\x05\0\0\0hello" + zstd(LINES),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_tables_of_every_form_give_their_rows(tmp_path: Path, name: str) -> None:
    path = put(tmp_path, (name, FORMATS[name])) / name
    assert read(path) == TEXTS and find(path).num_documents is None
    examples = read_examples([str(path)], Columns("text", "text"), "task.paths")
    assert [example.prompt for example in examples] == TEXTS
    assert {example.task for example in examples} == {name.split(".")[0]}


@pytest.mark.parametrize(("name", "content"), [
    ("a.txt", BOM + TEXTS[0].encode()), ("a.TXT.gz", gzip.compress(BOM + TEXTS[0].encode())),
    ("README.bz2", bz2.compress(TEXTS[0].encode())), ("a.md.zst", zstd(TEXTS[0].encode())),
], ids=["text", "gzip", "bzip2", "zstd"])  # fmt: skip
def test_texts_of_every_form_are_one_document(tmp_path: Path, name: str, content: bytes) -> None:
    path = put(tmp_path, (name, content)) / name
    assert read(path) == TEXTS[:1] and find(path).num_documents == 1


STAY = {
    "README": "{ braces }\n", "a.py": '{"a": 1}\n', "b.py": '{"a": 1}\n{"b": f(x)}\n', "a.md": "[![badge](x)](y)\n",
    "a.tex": "{\\bf x}\n", "a.log": '{"a": 1} and more\n{"b": 2}\n', "list.txt": "[1, 2]\n[3]\n", "empty.txt": "",
    "notebook.ipynb": '{\n "cells": [],\n "nbformat": 4\n}\n', "parts.txt": "PAR1 is a word\n",
    "BZh.txt": "BZh9 too\n",
    "twice.txt": "\ufeff\ufeffa", "prose.csv": "No table, but a line.\nAnd one more.\n", "one.json5": "{'text': 'a'}\n",
    "objects.txt": "[{}, 1]", "blank.txt": " \n\t\n",
}  # fmt: skip


@pytest.mark.parametrize("name", STAY)
def test_text_is_text_whatever_its_name(tmp_path: Path, name: str) -> None:
    text = STAY[name]
    assert read(put(tmp_path, (name, text.encode())) / name) == [text.removeprefix("\ufeff")]


LONG = [{"text": "x" * 70_000}, {"text": "y"}]
REFUSED = {  # name -> content, words of the line
    "data.txt": (LINES, "looks like JSON lines, not like one document; name it .jsonl"),
    "corpus.dat": (b"\n" + LINES, "looks like JSON lines"),
    "noending": (BOM + LINES.rstrip(b"\n"), "looks like JSON lines"),
    "one.txt": (LINES.split(b"\n")[0], "looks like JSON lines"),
    "other.txt": (b'{"body": "a"}\n\n{"body": "b"}\n', "looks like JSON lines"),
    "long.txt": ("\n".join(map(json.dumps, LONG)).encode(), "looks like JSON lines"),
    "array.txt": (ARRAY, "looks like a JSON array of objects, not like one document; name it .json"),
    "lines.txt.gz": (gzip.compress(LINES), "looks like JSON lines"),
    "names.csv": (b"name,age\nx,1\n", "looks like a table"),
    "table.csv": (b'id,"text"\r\n1,a\r\n', "looks like a table, not like one document; convert it to .jsonl"),
    "table.TSV": (b"text\tid\na\t1\n", "looks like a table"),
    "a.jsonl": (PARQUET, "is a parquet file, no jsonl file; name it .parquet"),
    "b.json": (PARQUET, "is a parquet file, no json file; name it .parquet"),
    "array.jsonl": (ARRAY, "begins with a JSON array, not with an object on a line; name it .json"),
    "lines.parquet": (LINES, "is not the parquet file that its name says: it looks like JSON lines; fetch it again"),
    "prose.parquet": (b"some text", "is not the parquet file that its name says: it is something else"),
    "empty.parquet": (b"", "is not the parquet file that its name says: it is empty"),
    "cut.parquet": (PARQUET[:-30], "broken parquet file: "),
    "page.parquet": (PARQUET[:4] + bytes(40) + PARQUET[44:], "broken parquet file: "),
    "a.parquet.gz": (gzip.compress(PARQUET), "is a parquet file packed with gzip; unpack it"),
    "plain.jsonl.gz": (LINES, "is not the gzip file that its name says: it is something else; fetch it again"),
    "empty.txt.gz": (b"", "is not the gzip file that its name says: it is empty"),
    "other.txt.gz": (zstd(b"a"), "is not the gzip file"),
    "cut.jsonl.gz": (gzip.compress(os.urandom(5000).hex().encode())[:-20], "broken gzip file: "),
    "flip.txt.gz": (gzip.compress(b"abc")[:-8] + bytes(8), "broken gzip file: CRC"),
    "cut.txt.bz2": (bz2.compress(b"abc" * 999)[:-9], "broken bzip2 file: "),
    "cut.txt.xz": (lzma.compress(b"abc" * 999)[:-9], "broken xz file: "),
    "cut.jsonl.zst": (zstd(LINES)[:-3], "broken zstd file: "),
    "junk.txt.zst": (zstd(b"abc") + b"junk", "broken zstd file: "),
    "deep.jsonl": (DEEP, "broken jsonl file: line 1: nested too deeply; repair it"),
    "deep.json": (b'{"text": "b"}\n' + DEEP, "broken json file: line 2: nested too deeply"),
    "numbers.json": (b"[1, 2]", "broken json file: line 1: int, not an object"),
    "torn.json": (b'[\n{"text": "a"},\n{"te', "broken json file: line 3: "),
    "comma.json": (b'[{"text": "a"},]', "line 1: a comma before the end of the array"),
    "open.json": (b'[{"text": "a"}\n', "line 2: no ']' where one should be"),
    "more.json": (b'[{"text": "a"}]\n{"text": "b"}', "line 2: '{' where the file should end"),
    "list.json": (b'{"text": "a"}, {"text": "b"}', "broken json file: line 1: "),
    "blanks.json": (b'[{"text": "a"} {"text": "b"}]', "line 1: no ',' where one should be"),
    "config.json": (b'{"name": "x"}', "row 1 has no such column; it has name: name one of these"),
    "latin.json": (b'{"text": "\xe9"}', "broken json file: line 1: 'utf-8' codec"),
    "nul.txt": (bytes(4096), "is not text: byte 0 is NUL"),
    "tail.txt": (b"text" + bytes(99), "is not text: byte 4 is NUL (damaged, binary or UTF-16); restore it or leave"),
    "nul.jsonl": (LINES + bytes(512), "broken jsonl file: line 4: NUL bytes, as a power cut leaves them"),
    "nul.json": (ARRAY[:20] + bytes(512), "broken json file: line 2: NUL bytes"),
    "wide.txt": ("some text".encode("utf-16"), "is UTF-16 text; convert it to UTF-8, with iconv -t UTF-8"),
    "big.jsonl": (b"\xfe\xff" + LINES.decode().encode("utf-16-be"), "is UTF-16 text"),
    "wider.txt": ("some text".encode("utf-32"), "is UTF-32 text"),
    "wide_without_mark.txt": ("some text".encode("utf-16-le"), "byte 1 is NUL"),
    "latin.txt": (BOM + b"latin \xe9", "not UTF-8 text (byte 9)"),
    "a.zip": (packed(lambda s: zipfile.ZipFile(s, "w").close()), "is a zip archive; unpack it"),
    "a.tar": (tar(), "is a tar archive; unpack it"),
    "a.tar.gz": (gzip.compress(tar()), "is a tar archive; unpack it"),
    "a.txt.7z": (b"7z\xbc\xaf\x27\x1c\0\4", "is a 7z archive; unpack it"),
    "a.pdf": (b"%PDF-1.4\nall ascii", "is a PDF; convert it to text, .jsonl or .parquet"),
    "picture": (b"\x89PNG\r\n\x1a\n", "is an image; leave it out"),
    "a.arrow": (packed(lambda s: pyarrow.feather.write_feather(pyarrow.table({"text": ["a"]}), s)), "is an Arrow"),
    "weights.txt": (save({"a": torch.zeros(3)}), "is a safetensors file; leave it out"),
    "a.pkl": (pickle.dumps({"a": 1}), "is a pickle"),
    "a.npy": (packed(lambda s: np.save(s, np.zeros(3))), "is a NumPy array"),
    "a.pt": (packed(lambda s: torch.save({}, s)), "is a zip archive"),
    "pointer.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "fetch it with git lfs"),
    "pointer.txt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a Git LFS pointer"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_text_is_never_taken_for_prose(tmp_path: Path, name: str) -> None:
    content, words = REFUSED[name]
    message = failure(put(tmp_path, (name, content)))
    assert str(tmp_path / name) in message and words in message and "data.paths" in message, message
    assert ";" in message or "row 1" in message  # a remedy


def test_one_column_twice_is_refused(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert "a.parquet: has two columns text; rename one" in failure(tmp_path)


def test_json_is_decoded_in_pieces(tmp_path: Path, monkeypatch: Any) -> None:
    """However the pieces fall: an object, a name, an escape and a character of several bytes stand across them."""
    rows = [{"text": text * 9, "n": [1.5, -20, None, {"a": "\\u00e9\\"}]} for text in ("é☃", '"q"\n', "🙂")]
    put(tmp_path, ("a.json", json.dumps(rows, indent=2, ensure_ascii=False).encode()))
    put(tmp_path, ("b.json", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()))
    put(tmp_path, ("c.json", b""), ("d.json", b" [ ] \n"))
    damaged = tmp_path / ".damaged/x.json"
    damaged.parent.mkdir()
    for size in (1, 2, 7, 64, 1 << 20):
        monkeypatch.setattr(readers, "_CHUNK", size)
        assert read(tmp_path) == [row["text"] for row in rows] * 2
        for number in (1, 2, 3):
            bad = [json.dumps(row) for row in rows]
            bad[number - 1] = '{"text": oops}'
            damaged.write_text("\n".join(bad), encoding="utf-8")
            assert f"broken json file: line {number}: Expecting value" in failure(damaged)


NAMES = [
    "a::b", "[x]", "*", "?", "two words", "new\nline", "#", "-x", "http:", "ü☃", "%20", "'\"", "a=b", "~",
    "back\\slash", "s3::x", "x" * 200, "\udcff",
]  # fmt: skip


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".txt", ".jsonl.gz"])
def test_names_are_names(tmp_path: Path, suffix: str) -> None:
    content = {".parquet": PARQUET, ".jsonl": LINES, ".txt": TEXTS[0].encode(), ".jsonl.gz": gzip.compress(LINES)}[
        suffix
    ]
    wanted = TEXTS[:1] if suffix == ".txt" else TEXTS
    put(tmp_path, *((name + suffix, content) for name in NAMES))
    for name in NAMES:
        assert read(tmp_path / (name + suffix)) == wanted, name
    assert read(tmp_path) == wanted * len(NAMES)
    assert len(find(tmp_path).fingerprint(tmp_path / ".cache")) == 64
    put(tmp_path, ("new\nline" + suffix, b"\0"), ("\udcff" + suffix, b"\0"))
    for name in ("new\\nline", "\\udcff"):
        (bad,) = [path for path in tmp_path.iterdir() if path.name.startswith(name.encode().decode("unicode_escape"))]
        assert f"/{name}{suffix}" in failure(bad)


# Links
def test_links_are_followed(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", ("deep/2.txt", b"two"), ("rows.jsonl", LINES))
    put(tmp_path / "data", ("1.txt", b"one"))
    (tmp_path / "data/more").symlink_to("../elsewhere")
    (tmp_path / "data/9.txt").symlink_to(tmp_path / "elsewhere/deep/2.txt")
    corpus = find(tmp_path / "data")
    assert [name for name, _ in corpus.files] == ["1.txt", "9.txt", "more/deep/2.txt", "more/rows.jsonl"]
    assert list(corpus.documents()) == ["one", "two", "two", *TEXTS]
    assert corpus.summary == "data.paths: 3 text, 1 jsonl; read again under another name: more/deep/2.txt"
    (tmp_path / "linked").symlink_to("data")
    assert read(tmp_path / "linked") == list(corpus.documents())
    assert find(tmp_path / "linked").fingerprint(tmp_path) == corpus.fingerprint(tmp_path)


@pytest.mark.parametrize("target", [".", "..", "../..", "/", "../other"])
def test_a_link_to_a_folder_around_it_is_refused(tmp_path: Path, target: str) -> None:
    put(tmp_path / "data", ("sub/1.txt", b"one"))
    (tmp_path / "data/sub/loop").symlink_to(target)
    (tmp_path / "data/other").mkdir()
    (tmp_path / "data/other/back").symlink_to("../sub")
    message = failure(tmp_path / "data")
    where = {"../other": ("sub/loop/back", "other/back/loop")}.get(target, ("sub/loop", "other/back/loop"))
    assert any(
        f"{tmp_path}/data/{name}: is a link to a folder that it stands in; remove it" in message for name in where
    )


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    put(tmp_path, ("1.txt", b"one"))
    (tmp_path / "gone.txt").symlink_to("nowhere")
    assert f"{tmp_path}/gone.txt: is a link to nowhere, which is not there; restore or remove it" in failure(tmp_path)
    assert "is a link to nowhere" in failure(tmp_path / "gone.txt")
    (tmp_path / "gone.txt").unlink()
    (tmp_path / "self").symlink_to("self")
    assert f"{tmp_path}/self: is a link to self, which is not there" in failure(tmp_path)
    (tmp_path / "self").unlink()
    os.mkfifo(tmp_path / "pipe")
    assert f"{tmp_path}/pipe: is a pipe, not a file; remove it" in failure(tmp_path)
    assert "is a pipe" in failure(tmp_path / "pipe")
    (tmp_path / "pipe").unlink()
    with socket.socket(socket.AF_UNIX) as own:
        own.bind(os.path.relpath(tmp_path / "s"))  # the address has a hundred bytes at most
        assert f"{tmp_path}/s: is a socket, not a file" in failure(tmp_path)
    (tmp_path / "s").unlink()
    assert "/dev/null: is a device, not a file" in failure(Path("/dev/null"))
    assert read(tmp_path) == ["one"]


def test_paths_that_are_none(tmp_path: Path) -> None:
    for path in ("", "a\0b"):
        with pytest.raises(ConfigError, match=r"data\.paths: '.*' is not a path; correct it"):
            find_corpus([path], "text", "data.paths")
    assert "no such file or folder; correct the path" in failure(Path("x" * 300))
    put(tmp_path, (".hidden/1.txt", b"one"))
    assert "the folder holds no files but hidden ones; name one that does" in failure(tmp_path)
    assert read(tmp_path / ".hidden") == ["one"]


def test_a_folder_deeper_than_calls_go(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*"d" * 200)
    deep.mkdir(parents=True)
    put(deep, ("1.txt", b"one"))
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 150)
    try:
        found = read(tmp_path)
    finally:
        sys.setrecursionlimit(limit)
    assert found == ["one"]


def test_what_is_said_of_a_folder(tmp_path: Path) -> None:
    put(tmp_path, ("a.txt", b"one"), ("b", b"two"), ("c.jsonl.gz", gzip.compress(LINES)), ("d.parquet", PARQUET))
    put(tmp_path, ("e.JSONL", LINES), (".git/x", b""), (".a\nb", b""), ("sub/.DS_Store", b""))
    said = "2 text, 1 jsonl in gzip, 1 parquet, 1 jsonl; passed over as hidden: .a\\nb, .git, sub/.DS_Store"
    assert find(tmp_path).summary == f"data.paths: {said}"
    assert find(tmp_path / "a.txt", tmp_path / "a.txt").summary.endswith("read again under another name: a.txt")
    put(tmp_path / "many", ("a.txt", b""), *((f".{i:02}", b"") for i in range(10)))
    assert find(tmp_path / "many").summary.endswith(".06, .07 and 2 more")
    said = find_corpus([], "text", "data.paths").summary
    assert said.startswith("data.paths: ") and said.endswith(" text of Python's standard library")


# Fingerprint
def test_the_fingerprint_of_what_was_read_right_is_for_ever(tmp_path: Path) -> None:
    """A run compares it when it resumes; of a file that was read wrong before it is another one."""
    put(tmp_path, ("b/2.txt", b"two\r\n"), ("a.md", "one é".encode()), ("c[1].jsonl", b'{"text": "three"}\n'))
    put(tmp_path, ("empty.txt", b""), ("README", b"{ braces\n"), (".hidden", b"no"))
    pinned = "fdcefb373ad2efd7de330d315306b836f63cd67a0af9572d326671e278927879"
    assert find(tmp_path).fingerprint(tmp_path / ".cache") == pinned
    empty = find(put(tmp_path / "other", ("a.parquet", PARQUET))).fingerprint(tmp_path / ".cache")
    (tmp_path / "other/a.parquet").write_bytes(parquet(text=TEXTS))
    assert find(tmp_path / "other").fingerprint(tmp_path / ".cache") != empty
    for name, content in (("a.txt", BOM + b"x"), ("a.JSONL", LINES), ("a.json", LINES)):
        corpus = find(put(tmp_path / name.partition(".")[2], (name, content)))
        (path,) = [path for _, path in corpus.files]
        wrong = corpus_module.Corpus("k", corpus.files, "text", (corpus_module.Form("text"),), "")
        if name == "a.txt":
            assert corpus.fingerprint(tmp_path) != wrong.fingerprint(tmp_path), path


def test_a_damaged_digest_is_made_again(tmp_path: Path, monkeypatch: Any) -> None:
    corpus = find(put(tmp_path / "data", ("a.txt", b"one")))
    plain = corpus.fingerprint(tmp_path)
    monkeypatch.setattr(corpus_module, "_REMEMBER_FROM", 0)
    assert corpus.fingerprint(tmp_path) == plain
    (kept,) = (tmp_path / "digests").iterdir()
    for damage in (b"", bytes(64)[:9], b"\xff"):
        kept.write_bytes(damage)
        assert corpus.fingerprint(tmp_path) == plain
    status = (tmp_path / "data/a.txt").stat()
    (tmp_path / "data/a.txt").write_bytes(b"two")  # of one size and, by a copy that keeps times, of one time
    os.utime(tmp_path / "data/a.txt", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert corpus.fingerprint(tmp_path) != plain


# Tasks
def test_files_of_tasks_of_every_form(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "answers": ["a"]}]
    line = json.dumps(rows[0]).encode() + b"\n"
    task = TASKS["qasper"]
    for name, content in (
        ("qasper_16384.JSONL.gz", gzip.compress(line)), ("qasper.json", json.dumps(rows).encode()),
        ("x.ndjson", json.dumps(rows[0] | {"task": "qasper"}).encode()),
    ):  # fmt: skip
        put(tmp_path / name, (name, content), ("notes.json", b"[1, 2]"), ("torn.json", b"{"), ("a.zip", b"PK\x03\x04"))
        put(tmp_path / name, ("qasper_train.jsonl.gz", gzip.compress(line)))
        assert [e.task for e in files.read(task, str(tmp_path / name), "--data")] == ["qasper"]
    (tmp_path / "linked").symlink_to(tmp_path / "qasper.json")
    assert files.find(task, str(tmp_path / "linked"), "--data").name == "qasper.json"
    with pytest.raises(ConfigError, match=r"torn\.jsonl: is a broken jsonl file: line 1"):
        files.find(task, str(put(tmp_path / "torn", ("torn.jsonl", b"{"))), "--data")
