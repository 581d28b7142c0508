"""A corpus: an ordered set of files and the documents they hold."""

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_refine.config import ConfigError
from megatron_refine.data.readers import TABLES, read_documents, reading
from megatron_refine.files import digest, write

_NOT_SOURCES = {"site-packages", "dist-packages", "test", "tests", "idlelib"}
_REMEMBER_FROM = 64 << 20  # bytes; smaller files are hashed at every start


@dataclass(frozen=True)
class Corpus:
    """Files in a fixed order. Names are relative to the path given, so that a moved corpus stays the same corpus."""

    key: str  # the key of the configuration that names the files
    files: tuple[tuple[str, Path], ...]  # (name, where it is)
    column: str  # text column of jsonl and parquet files

    def documents(self) -> Iterator[str]:
        """Every document, in order. Raises ConfigError for a file that cannot be read."""
        for _, path in self.files:
            yield from read_documents(path, self.column, self.key)

    @property
    def num_documents(self) -> int | None:
        """Documents in all where that is known without reading: a text file is one, a table holds any number."""
        return None if any(path.suffix in TABLES for _, path in self.files) else len(self.files)

    def fingerprint(self, cache_dir: Path) -> str:
        """Hash of the files' names and contents. Digests of large files are remembered in `cache_dir`."""
        total = hashlib.sha256()
        for name, path in self.files:
            total.update(json.dumps([name, _digest(path, cache_dir, self.key)]).encode())
        return total.hexdigest()


def find_corpus(paths: list[str], column: str, key: str) -> Corpus:
    """The files under `paths`; no paths: the sources of Python's standard library.

    Raises ConfigError for a path that does not exist and for a folder without files.
    """
    if not paths:
        return Corpus(key, tuple(_standard_library()), column)
    return Corpus(key, tuple(file for path in paths for file in _find(Path(path), key)), column)


def _find(path: Path, key: str) -> list[tuple[str, Path]]:
    with reading(path, key):
        if not path.exists():
            raise ConfigError(f"{key}: {path}: no such file or folder; correct the path")
        if not path.is_dir():
            return [(path.name, path)]
    files = _walk(path, key)
    if not files:
        raise ConfigError(f"{key}: {path}: the folder holds no files; name one that does")
    return files


def _walk(root: Path, key: str) -> list[tuple[str, Path]]:
    """Files below `root` by name, without hidden ones. A folder that cannot be listed is an error, not an omission."""

    def fail(error: OSError) -> None:
        raise error

    found = []
    with reading(root, key):
        for folder, subfolders, names in os.walk(root, onerror=fail):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted((path.relative_to(root).as_posix(), path) for path in found)


def _standard_library() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    return [(name, path) for name, path in _walk(root, "data.paths") if _is_source(Path(name))]


def _is_source(name: Path) -> bool:
    # Build settings hold the paths of the machine that compiled Python: they would differ between installations.
    build_settings = name.name.startswith("_sysconfigdata") or name.parts[0].startswith("config-")
    return name.suffix == ".py" and not build_settings and not _NOT_SOURCES & set(name.parts[:-1])


def _digest(path: Path, cache_dir: Path, key: str) -> str:
    """SHA-256 of a file; a large one is read again only when its size or time of change differs."""
    with reading(path, key):
        status = path.stat()
        if status.st_size < _REMEMBER_FROM:
            return digest(path)
    identity = f"{path.absolute()} {status.st_size} {status.st_mtime_ns}"
    memory = cache_dir / "digests" / hashlib.sha256(identity.encode()).hexdigest()
    if not memory.exists():
        with reading(path, key):
            found = digest(path)
        write(memory, found)
    return memory.read_text(encoding="utf-8")
