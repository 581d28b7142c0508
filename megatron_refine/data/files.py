"""Files that several processes may write at once: each writes its own, the rename decides."""

import hashlib
import os
import socket
from pathlib import Path


def digest(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def temporary(path: Path) -> Path:
    """A hidden name beside `path` that no other process uses, on this machine or another."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def write_atomically(path: Path, text: str) -> None:
    """Write `text` so that `path` is either absent, old or complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = temporary(path)
    unfinished.write_text(text)
    unfinished.replace(path)
