"""A corpus: an ordered set of files and the documents they hold."""

import hashlib
import json
import os
import stat
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_refine.config import ConfigError
from megatron_refine.data.formats import Form, form_of, reading, refusal, shown
from megatron_refine.data.readers import read_documents
from megatron_refine.files import digest, write

_NOT_SOURCES = {"site-packages", "dist-packages", "test", "tests", "idlelib"}
_REMEMBER_FROM = 64 << 20  # bytes; smaller files are hashed at every start
_DIGEST = 64  # characters
_NAMED = 8  # files that a line names before it counts the others
_SPECIAL = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


@dataclass
class Walk:
    """The files that were found below the paths of a corpus."""

    files: list[tuple[str, Path]] = field(default_factory=list)  # (name, where it is)
    hidden: list[str] = field(default_factory=list)  # files and folders that were passed over
    again: list[str] = field(default_factory=list)  # files that stand under an earlier name too
    seen: set[tuple[int, int]] = field(default_factory=set)  # device and number of every file


@dataclass(frozen=True)
class Corpus:
    """Files in a fixed order. Names are relative to the path given, so that a moved corpus stays the same corpus."""

    key: str  # the key of the configuration that names the files
    files: tuple[tuple[str, Path], ...]  # (name, where it is)
    column: str  # text column of tables
    forms: tuple[Form, ...]  # of each file
    summary: str  # how many files of which kind, and what was passed over; one line

    def documents(self) -> Iterator[str]:
        """Yield every document, in order. Raises ConfigError for a file that cannot be read."""
        for (_, path), form in zip(self.files, self.forms, strict=True):
            yield from read_documents(path, self.column, self.key, form)

    @property
    def num_documents(self) -> int | None:
        """Number of documents. None where it is not known without reading: a text file is one, a table holds any."""
        return None if any(form.is_table for form in self.forms) else len(self.files)

    def fingerprint(self, cache_dir: Path) -> str:
        """Hash the files' names and contents. Digests of large files are remembered in `cache_dir`."""
        total = hashlib.sha256()
        for (name, path), form in zip(self.files, self.forms, strict=True):
            known = [name, _digest(path, cache_dir, self.key), *_unlike_format_1(path, form)]
            total.update(json.dumps(known).encode())
        return total.hexdigest()


def find_corpus(paths: list[str], column: str, key: str) -> Corpus:
    """Find the files under `paths`, links followed; no paths: the sources of Python's standard library.

    Raises ConfigError for a path that does not exist, for a folder without files, and for a file, a folder or a link
    that cannot be read or is neither text nor a table.
    """
    walk = find_files(paths, key) if paths else _standard_library()
    forms = tuple(form_of(path, key) for _, path in walk.files)
    kinds = ", ".join(f"{count:,} {form}" for form, count in Counter(map(str, forms)).most_common())
    summary = f"{key}: {kinds}" if paths else f"{key}: {kinds} of Python's standard library"
    if walk.hidden:
        summary += f"; passed over as hidden: {_some(walk.hidden)}"
    if walk.again:
        summary += f"; read again under another name: {_some(walk.again)}"
    return Corpus(key, tuple(walk.files), column, forms, summary)


def find_files(paths: list[str], key: str) -> Walk:
    """Find the files under `paths`, whatever they hold, in order. Raises ConfigError as `find_corpus` does."""
    walk = Walk()
    for path in paths:
        if not path or "\0" in path:
            raise ConfigError(f"{key}: {shown(path)!r} is not a path; correct it")
        _find(_native(path), key, walk)
    return walk


def _find(path: Path, key: str, walk: Walk) -> None:
    with reading(path, key):
        if not os.path.lexists(path):
            raise refusal(path, key, "no such file or folder; correct the path")
        folder = path.is_dir()
    if not folder:
        _check(path, key, walk, path.name)
        walk.files.append((_utf8(path.name), path))
        return
    found = [(_utf8(file.relative_to(path).as_posix()), file) for file in _below(path, key, walk)]
    if not found:
        hidden = " but hidden ones" if walk.hidden else ""
        raise refusal(path, key, f"the folder holds no files{hidden}; name one that does")
    for name, file in sorted(found):
        _check(file, key, walk, name)
        walk.files.append((name, file))


def _below(root: Path, key: str, walk: Walk) -> Iterator[Path]:
    """Yield the files below a folder, but hidden ones. A folder that cannot be listed is an error, not an omission."""
    with reading(root, key):
        parents = frozenset(_identity(parent) for parent in root.resolve().parents)
    folders = [(root, parents)]  # each with the folders that it stands in, which a link must not lead to again
    while folders:
        folder, above = folders.pop()
        with reading(folder, key):
            own = _identity(folder)
            if own in above:
                raise refusal(folder, key, "is a link to a folder that it stands in; remove it")
            entries = [(path, path.is_dir()) for path in folder.iterdir()]
        for path, is_folder in entries:
            if path.name.startswith("."):
                walk.hidden.append(path.relative_to(root).as_posix())
            elif is_folder:
                folders.append((path, above | {own}))
            else:
                yield path


def _identity(path: Path) -> tuple[int, int]:
    """Return device and number, which are the same for all names of a file or folder."""
    status = path.stat()
    return status.st_dev, status.st_ino


def _check(path: Path, key: str, walk: Walk, name: str) -> None:
    """Raise ConfigError where there is no file behind a name."""
    with reading(path, key):
        if path.is_symlink() and not path.exists():
            target = shown(os.readlink(path))
            raise refusal(path, key, f"is a link to {target}, which is not there; restore or remove it")
        special, own = _SPECIAL.get(stat.S_IFMT(path.stat().st_mode)), _identity(path)
    if special:
        raise refusal(path, key, f"is {special}, not a file; remove it or name files")
    if own in walk.seen:
        walk.again.append(name)
    walk.seen.add(own)


def _some(names: list[str]) -> str:
    """List the first names, and say how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(map(shown, sorted(names)[:_NAMED])) + (f" and {more:,} more" if more > 0 else "")


def _utf8(name: str) -> str:
    """Read a file's name as UTF-8, whatever the locale: a corpus has one fingerprint. Odd bytes are kept."""
    return name.encode(sys.getfilesystemencoding(), "surrogateescape").decode("utf-8", "surrogateescape")


def _native(path: str) -> Path:
    """Return a path that the locale's encoding can write. The configuration is UTF-8, and so are names on the disk."""
    try:
        path.encode(sys.getfilesystemencoding(), "surrogateescape")
    except UnicodeEncodeError:
        path = os.fsdecode(path.encode("utf-8", "surrogateescape"))
    return Path(path)


def _unlike_format_1(path: Path, form: Form) -> list[str]:
    """Return what tells a file's form in the fingerprint; nothing of one that the first format of rows read alike."""
    kind = {".jsonl": "jsonl", ".parquet": "parquet"}.get(path.suffix, "text")
    same = form.kind == kind and not form.packing and not (form.bom and kind == "text")
    return [] if same else [f"{form} without BOM"]


def _standard_library() -> Walk:
    """Find the sources. Links are not followed and other files not looked at: installations differ in both."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in _NOT_SOURCES]
        paths = [Path(folder, name) for name in names if not name.startswith(".")]
        found += [(path.relative_to(root).as_posix(), path) for path in paths if _is_source(path.relative_to(root))]
    return Walk(sorted(found))


def _is_source(name: Path) -> bool:
    # Build settings hold the paths of the machine that compiled Python: they would differ between installations.
    build_settings = name.name.startswith("_sysconfigdata") or name.parts[0].startswith("config-")
    return name.suffix == ".py" and not build_settings and not _NOT_SOURCES & set(name.parts[:-1])


def _digest(path: Path, cache_dir: Path, key: str) -> str:
    """Return the SHA-256 of a file. A large one is read again only when its size or time of change differs."""
    with reading(path, key):
        status = path.stat()
        if status.st_size < _REMEMBER_FROM:
            return digest(path)
    identity = f"{path.absolute()} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
    memory = cache_dir / "digests" / hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()
    known = memory.read_bytes().decode(errors="replace") if memory.exists() else ""
    if len(known) != _DIGEST:  # a power cut may leave an empty file
        with reading(path, key):
            known = digest(path)
        write(memory, known)
    return known
