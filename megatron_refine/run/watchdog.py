"""A deadline for every phase of a run: a rank that hangs says where, and ends."""

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

from megatron_refine.platform import rendezvous

EXIT_LOST = 8  # a rank was lost, or hung: what was saved is intact


class Watchdog:
    """Watches one process. Phases follow each other; the longest of each is remembered."""

    def __init__(self, minutes: float, detail: Callable[[], str] = str):
        """`detail()` says more of where a phase is; minutes: deadline of every phase."""
        self.seconds, self.detail = 60 * minutes, detail
        self.longest: dict[str, float] = {}
        self._phase, self._since = "", 0.0
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Within, the process is in `phase`."""
        self._since, self._phase = time.monotonic(), phase
        yield
        self.longest[phase] = max(self.longest.get(phase, 0.0), time.monotonic() - self._since)
        self._phase = ""

    @property
    def where(self) -> str:
        """This rank, its host and what it is doing; after a failure, what failed."""
        detail = self.detail()
        phase = f", phase {self._phase}{f' ({detail})' if detail else ''}" if self._phase else ""
        return f"rank {rendezvous.global_rank()} on {socket.gethostname()}{phase}"

    def _watch(self) -> None:
        while True:
            time.sleep(min(1.0, self.seconds / 10))
            phase, since = self._phase, self._since
            if phase and time.monotonic() - since > self.seconds and self._phase == phase:
                faulthandler.dump_traceback(sys.stderr)
                sys.stderr.write(
                    f"{self.where}: not done after run.phase_minutes={self.seconds / 60:g}; ended. The stacks above "
                    "say where it hung; run the same command to go on from the last checkpoint\n"
                )
                sys.stderr.flush()
                os._exit(EXIT_LOST)
