"""The kinds of files, told by name and by first bytes, which must agree.

A text is a text whatever its name. A file that is none is read as what it is, or refused by name with the remedy; it is
never taken for prose.
"""

import bz2
import contextlib
import errno
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import IO, Any

from megatron_refine.config import ConfigError
from megatron_refine.data.streams import Streams

BOM = b"\xef\xbb\xbf"
_HEAD = 512  # bytes that are looked at; a tar archive's mark stands at 257
_PARQUET = b"PAR1"  # at both ends
_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".jsonlines": "jsonl", ".json": "json", ".parquet": "parquet"}
_PACKINGS = {  # name -> suffixes, first bytes
    "gzip": ((".gz",), re.compile(rb"\x1f\x8b\x08")),
    "bzip2": ((".bz2",), re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)")),
    "xz": ((".xz",), re.compile(rb"\xfd7zXZ\0")),
    "zstd": ((".zst", ".zstd"), re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")),
}
_UNPACK, _CONVERT = "unpack it", "convert it to text, .jsonl or .parquet"
_UTF8 = "convert it to UTF-8, with iconv -t UTF-8"
_OTHERS: list[tuple[bytes, str, str]] = [  # first bytes as a pattern, what begins so, what to do
    (rb"PK\x03\x04|PK\x05\x06", "a zip archive", _UNPACK),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (rb"Rar!\x1a\x07", "a rar archive", _UNPACK),
    (rb"(?s:.{257})ustar", "a tar archive", _UNPACK),
    (rb"\x04\x22\x4d\x18", "packed with lz4", _UNPACK),
    (rb"%PDF-", "a PDF", _CONVERT),
    (rb"%!PS", "PostScript", _CONVERT),
    (rb"\{\\rtf[0-9]", "an RTF document", _CONVERT),
    (rb"\xd0\xcf\x11\xe0", "an Office document", _CONVERT),
    (rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|II\*\0|MM\0\*|RIFF(?s:....)WEBP", "an image", "leave it out"),
    (rb"ARROW1|FEA1|\xff\xff\xff\xff(?s:...)\0", "an Arrow or Feather table", _CONVERT),
    (rb"Obj\x01", "an Avro table", _CONVERT),
    (rb"SQLite format 3\0", "an SQLite database", _CONVERT),
    (rb"\x89HDF", "an HDF5 file", _CONVERT),
    (rb"\x93NUMPY", "a NumPy array", _CONVERT),
    (rb"(?s:.{6})\0\0\{[\s\"]", "a safetensors file", "leave it out"),
    (rb"\x80[\x02-\x05]", "a pickle", "leave it out"),
    (rb"\x7fELF|GGUF", "a binary file", "leave it out"),
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32 text", _UTF8),
    (rb"\xff\xfe|\xfe\xff", "UTF-16 text", _UTF8),
    (rb"version https://git-lfs\.github\.com/spec/", "a Git LFS pointer, not the file", "fetch it with git lfs pull"),
]


@dataclass(frozen=True)
class Form:
    """The form of a file: how it is read."""

    kind: str  # text: the whole file is one document; jsonl, json, parquet: tables
    packing: str = ""  # gzip, bzip2, xz or zstd
    bom: bool = False  # it begins with a byte order mark, which is no part of what it holds

    @property
    def is_table(self) -> bool:
        return self.kind != "text"

    def __str__(self) -> str:
        return f"{self.kind} in {self.packing}" if self.packing else self.kind


@contextlib.contextmanager
def reading(path: Path, key: str) -> Iterator[None]:
    """Turn a failure of the file system into one line naming the file and the key that named it."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        forbidden = error.errno in (errno.EACCES, errno.EPERM)
        remedy = "check its permissions or leave it out" if forbidden else "restore it or leave it out"
        raise refusal(path, key, f"cannot be read: {reason}; {remedy}") from None
    except UnicodeEncodeError:
        raise refusal(path, key, "no file can have this name in this locale; set LC_ALL=C.UTF-8") from None


def refusal(path: PurePath, key: str, reason: str) -> ConfigError:
    """Return the one-line error for a file that is not read; `reason` ends with the remedy."""
    return ConfigError(f"{key}: {shown(path)}: {reason}")


def shown(name: object) -> str:
    """Return a file's name on one line, with what cannot be printed escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))


def named(path: PurePath) -> tuple[str, Form]:
    """Return a file's name without the endings that tell its form, and that form."""
    inner, packing = _split(path)
    return inner.stem, Form(_KINDS.get(inner.suffix.lower(), "text"), packing)


def suffix_in(path: PurePath) -> str:
    """Return the ending of a file's name without that of its packing: `.csv` of a.CSV.gz."""
    return _split(path)[0].suffix.lower()


def _split(path: PurePath) -> tuple[PurePath, str]:
    """Return a file's name without the ending of its packing, and that packing, "" for none."""
    for name, (suffixes, _) in _PACKINGS.items():
        if path.suffix.lower() in suffixes:
            return PurePath(path.stem), name
    return PurePath(path.name), ""


def form_of(path: Path, key: str) -> Form:
    """Tell how to read the file at `path`.

    Raises ConfigError where its name and its first bytes disagree, and for a file that is neither text nor a table.
    """
    says = named(path)[1]
    with reading(path, key), path.open("rb") as file:
        head = file.read(_HEAD)
        file.seek(max(file.seek(0, io.SEEK_END) - len(_PARQUET), 0))
        end = file.read()
    packing = next((name for name, (_, magic) in _PACKINGS.items() if magic.match(head)), "")
    if says.packing and packing != says.packing:
        found = "is empty" if not head else "is something else"
        raise refusal(
            path, key, f"is not the {says.packing} file that its name says: it {found}; fetch it again or rename it"
        )
    if packing:
        with opened(path, Form(says.kind, packing), key) as stream:
            head = stream.read(_HEAD)
    kind = _checked(path, key, says.kind, packing, head, end)
    return Form(kind, packing, head.startswith(BOM))


def _checked(path: Path, key: str, kind: str, packing: str, head: bytes, end: bytes) -> str:
    """Return the kind of a file whose name says `kind`: that, or parquet. Raises ConfigError for other bytes."""
    if head.startswith(_PARQUET) and (kind == "parquet" or (end == _PARQUET and not packing)):
        if packing or kind in ("jsonl", "json"):
            how = f" packed with {packing}; unpack it" if packing else f", no {kind} file; name it .parquet"
            raise refusal(path, key, f"is a parquet file{how}")
        return "parquet"
    for pattern, what, remedy in _OTHERS:
        if re.match(pattern, head):
            raise refusal(path, key, f"is {what}; {remedy}")
    first = head.removeprefix(BOM).lstrip()[:1]
    if kind == "parquet":
        found = {b"": "is empty", b"{": "looks like JSON lines"}.get(first, "is something else")
        raise refusal(path, key, f"is not the parquet file that its name says: it {found}; fetch it again or rename it")
    if kind == "jsonl" and first == b"[":
        raise refusal(path, key, "begins with a JSON array, not with an object on a line; name it .json")
    return kind


@contextlib.contextmanager
def opened(path: Path, form: Form, key: str) -> Iterator[IO[bytes]]:
    """Open the file's bytes, unpacked. Raises ConfigError naming the file where they cannot be read or unpacked."""
    broken = (EOFError, zlib.error, lzma.LZMAError)
    with reading(path, key), path.open("rb") as file:
        try:
            with _unpacked(file, form.packing) as stream:
                yield stream
        except (OSError, *broken) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            reason = " ".join(str(error).split())
            what = f"is a broken {form.packing} file: {reason}; fetch it again or leave it out"
            raise refusal(path, key, what) from None


def _unpacked(file: IO[bytes], packing: str) -> contextlib.AbstractContextManager[Any]:
    if packing == "zstd":
        import pyarrow  # late: takes a moment

        return io.BufferedReader(pyarrow.input_stream(file, compression="zstd"))
    if packing in ("bzip2", "xz"):
        decompressor = bz2.BZ2Decompressor if packing == "bzip2" else lzma.LZMADecompressor
        return io.BufferedReader(Streams(file, decompressor))
    return gzip.open(file) if packing else contextlib.nullcontext(file)
