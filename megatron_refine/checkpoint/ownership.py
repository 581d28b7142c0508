"""Who may write into a run's folder: the attempt that started last.

A job that is requeued while a lost node still runs its ranks has two attempts that write. Each attempt claims the
folder by a token in the file OWNER; what it writes later it writes under a lock, and only while the token is its own.
"""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_refine import launcher
from megatron_refine.errors import FencedError
from megatron_refine.files import TornError, read_json, write_json

OWNER, LOCK = "OWNER", ".lock"
LOCK_SECONDS = 60.0  # what is done under the lock takes far less, unless a process was frozen in it


def attempt_token() -> dict[str, Any]:
    """Return this process's token: under SLURM the job and how often it was requeued; then host, process and time."""
    own = launcher.read()
    return {
        "job": own.job,
        "restart": own.restart,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time": time.time(),
    }


class Ownership:
    """The claim of one attempt on `folder`, which exists. Only the rank that claims writes OWNER; all may check."""

    def __init__(self, folder: Path, token: dict[str, Any]):
        self.folder, self.token = folder, token

    @property
    def name(self) -> str:
        """The attempt's name, fit for a file and different from every other attempt's."""
        return "-".join(str(self.token[key]) for key in ("job", "restart", "host", "pid") if self.token[key] != "")

    def claim(self, say: Callable[[str], object] = lambda line: None) -> None:
        """Take the folder from earlier attempts. Raises FencedError where a later one of this job has it, OSError.

        An OWNER that a power cut tore is passed over, and `say` is told: those whose claim it was are gone.
        """
        with self._locked():
            try:
                other = self._read()
            except TornError as error:
                say(f"{str(error).split(';')[0]}; passed over: this attempt claims the folder")
                other = None
            same = other and self.token["job"] and other["job"] == self.token["job"]
            if other and same and other["restart"] > self.token["restart"]:
                raise self._fenced(other)
            write_json(self.folder / OWNER, self.token)

    def lost(self) -> bool:
        """Whether another attempt has taken over."""
        return self._owner() != self.token

    def check(self) -> None:
        """Raises FencedError where another attempt has taken over."""
        other = self._owner()
        if other != self.token:
            raise self._fenced(other)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within, no other attempt claims the folder. Raises FencedError where one has done so before."""
        with self._locked():
            self.check()
            yield

    def _owner(self) -> dict[str, Any] | None:
        """Who has claimed the folder; None where nobody can be read."""
        with contextlib.suppress(TornError):
            return self._read()
        return None

    def _read(self) -> dict[str, Any] | None:
        """The content of OWNER, None without it. Raises TornError where it is no token."""
        with contextlib.suppress(FileNotFoundError):
            found: dict[str, Any] = read_json(self.folder / OWNER)
            if not isinstance(found, dict) or not self.token.keys() <= found.keys():
                raise TornError(f"{self.folder / OWNER}: damaged: no token; delete it")
            return found
        return None

    def _fenced(self, other: dict[str, Any] | None) -> FencedError:
        return FencedError(
            f"{self.folder}: {_describe(other)} has taken over; this attempt ({_describe(self.token)}) writes nothing "
            "more"
        )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Where the file system has no locks, without one: then a claim between check and rename goes unnoticed."""
        with (self.folder / LOCK).open("w", encoding="utf-8") as file:
            deadline = time.monotonic() + LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise FencedError(
                            f"{self.folder / LOCK}: another process has held it for {LOCK_SECONDS:.0f} s; end that one"
                        ) from None
                    time.sleep(0.05)
                except OSError:
                    break
            yield


def _describe(token: dict[str, Any] | None) -> str:
    if token is None:
        return "someone who removed OWNER or damaged it"
    job = f"job {token['job']}, restart {token['restart']}, " if token["job"] else ""
    return f"{job}process {token['pid']} on {token['host']}"
