"""Small files: written whole or not at all, read as UTF-8 whatever the locale. Imports nothing of the project.

A reader finds the old content or the new one, after a crash or a power cut too. Several processes may write one file at
once: the last rename wins.
"""

import codecs
import contextlib
import hashlib
import json
import locale
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


class TornError(ValueError):
    """A small file is empty or holds no JSON, as a power cut leaves it: which file, and what to do."""


def write(path: Path, text: str) -> None:
    """Write `text` to `path`: a temporary file beside it, fsync, rename. Makes the folder. Raises OSError."""
    place(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any, indent: int | None = 1, sort_keys: bool = False) -> None:
    """`write` a value as JSON, with an end of line."""
    write(path, json.dumps(value, indent=indent, sort_keys=sort_keys) + "\n")


def copy(source: Path, path: Path) -> None:
    """Copy a file's content to `path`, as `write` does. Raises OSError."""
    place(path, lambda unfinished: shutil.copyfile(source, unfinished))


def place(path: Path, fill: Callable[[Path], Any]) -> None:
    """Let `fill` write a temporary file beside `path`, fsync it and rename it. Makes the folder. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = temporary(path)
    try:
        fill(unfinished)
        sync(unfinished)
        unfinished.replace(path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError):  # that of a full disk names no file
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    sync(path.parent)


class Appended:
    """A text file that grows. What is written leaves the process at once: when killed, it leaves a torn last line."""

    def __init__(self, path: Path):
        """Makes the folder. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._file = path, path.open("ab", buffering=0)  # a buffer would be written again when it is closed

    def write(self, text: str) -> None:
        """Raises OSError, which names the file."""
        rest = memoryview(text.encode())
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def sync(self) -> None:
        """Bring it to the disk, before another file says that it is there. Raises OSError."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> str:
    """The text of a file. Raises OSError, and TornError where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise TornError(f"{path}: damaged: not UTF-8 text; delete it or restore it") from None


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises OSError, and TornError where it is empty or torn."""
    text = read(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        found = f"not JSON ({error})" if text.strip("\0 \n") else "empty"
        raise TornError(f"{path}: damaged: {found}; delete it or restore it") from None


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON objects, one a line, as `write` does. Raises OSError."""
    write(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file that has one a line; [] without the file. A torn last line is left out.

    So are the NULs that a power cut leaves in place of what was not on the disk yet. Raises OSError, and TornError
    where another line is no JSON object.
    """
    rows: list[dict[str, Any]] = []
    lines = read(path).replace("\0", "").split("\n") if path.exists() else []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last line's end is torn, or nothing
        try:
            rows.append({**json.loads(line)})
        except (ValueError, TypeError, RecursionError):
            if number < len(lines) - 1 or lines[-1]:
                raise TornError(f"{path}:{number}: not a row: damaged, no JSON object; remove this line") from None
    return rows


def numbered(folder: Path, prefix: str) -> list[tuple[int, Path]]:
    """What is ours in `folder` of the kind `prefix`: real folders named by it and digits; (number, path), ascending.

    All else is someone's own and is left alone: links, copies under other names, files. [] without the folder.
    """
    try:
        found = [(re.fullmatch(rf"{re.escape(prefix)}([0-9]+)", path.name), path) for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((int(name[1]), path) for name, path in found if name and path.is_dir() and not path.is_symlink())


def digest(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    return {"size": path.stat().st_size, "sha256": digest(path)}


def temporary(path: Path) -> Path:
    """A hidden name beside `path` that no other process uses, on this machine or another."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def sync(path: Path) -> None:
    """Bring a file's content, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def start_in_utf8() -> None:
    """Begin this process anew in Python's UTF-8 mode where the locale knows ASCII alone.

    There Python cannot name a file `ü`, and reads such a word of the command line as something that is no text.
    """
    ascii_alone = codecs.lookup(locale.getencoding()).name == "ascii" and not sys.flags.utf8_mode
    if ascii_alone and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def speak_utf8() -> None:
    """Let stdout and stderr take every character: UTF-8 into files and pipes; what a terminal lacks is escaped.

    Libraries open their own files in the locale's encoding: where that is another one, they get a locale of UTF-8.
    """
    if locale.getencoding().replace("-", "").lower() != "utf8":
        os.environ["PYTHONUTF8"] = "1"  # of processes to come
        with contextlib.suppress(locale.Error):
            locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="backslashreplace")
