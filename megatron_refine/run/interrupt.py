"""Ctrl-C. Before training it ends the process at once; in training the first asks for a save, the second ends at once.

It is heard by a thread, so that a process that computes or waits in native code hears it too. Imports nothing heavy.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing import resource_tracker
from types import FrameType
from typing import NoReturn

from megatron_refine import launcher
from megatron_refine.errors import refused_file

EXIT_INTERRUPTED, EXIT_FILE = 130, 4
SAME = 0.5  # seconds: the terminal and a launcher may both deliver what was pressed once
_process = 0  # that listens; a forked helper inherits the handler
_ask: Callable[[], None] | None = None
_first = 0.0  # when it was first pressed in training


def listen() -> None:
    """Hear it from now on, once for all. Helpers that this process starts are spared: they inherit the mask."""
    global _process
    if _process == os.getpid():
        return
    _process = os.getpid()
    resource_tracker.ensure_running()  # it unblocks the signal when it starts
    signal.signal(signal.SIGINT, pressed)  # for threads from before, which do not block it
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    threading.Thread(target=_await, daemon=True, name="interrupt").start()


def ask_first(ask: Callable[[], None]) -> None:
    """Let the first Ctrl-C from now on call `ask`, in another thread, to have the process save and end."""
    global _ask
    _ask = ask


def pressed(number: int = signal.SIGINT, frame: FrameType | None = None) -> None:
    """What it does."""
    global _first
    if os.getpid() != _process:
        return
    now = time.monotonic()
    if _ask is None:
        _end("interrupted before a step was trained: the run is as it was; run the same command to go on")
    elif not _first:
        _first = now
        _say("Ctrl-C: the step under way is finished and saved; a second Ctrl-C ends at once, without saving")
        _ask()
    elif now - _first > SAME:
        _end("ended at once: run the same command to go on from the last checkpoint")


def again() -> None:
    """What a launcher makes of a second one (torchrun: SIGTERM); nothing where there was no first."""
    if _first:
        pressed()


def quiet(main: Callable[[], int]) -> int:
    """The exit code of `main`; after one line instead of a traceback that of an interrupted command, or of one that
    cannot make a file."""
    try:
        return main()
    except OSError as error:
        line = refused_file(error)
        if not line:
            raise
        _say(line)
        return EXIT_FILE
    except KeyboardInterrupt:
        _say("interrupted")
        return EXIT_INTERRUPTED


def _await() -> None:
    while True:
        signal.sigwait({signal.SIGINT})
        pressed()


def _end(line: str) -> NoReturn:
    _say(line)
    os._exit(EXIT_INTERRUPTED)


def _say(line: str) -> None:
    """On the rank that speaks for all. Not through sys.stderr: the process may be stopped in the middle of using it."""
    if launcher.speaks():
        os.write(2, f"{line}\n".encode())
