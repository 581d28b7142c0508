"""The process that Megatron's saves collect their results in: it outlives signals to a job, and not its rank. And what
they tell of a failure.

It is spawned anew, so this module imports nothing heavy.
"""

import ctypes
import functools
import multiprocessing
import signal
from multiprocessing import resource_tracker
from multiprocessing.managers import SyncManager
from typing import Any

from megatron_refine.platform.megatron.version import since

PR_SET_PDEATHSIG = 1  # of prctl(2)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SHIELDED = (*STOP_SIGNALS, signal.SIGINT)


@functools.cache
def shield_saves() -> None:
    """Start it, once, instead of Megatron.

    Megatron starts it with its first save and keeps it. SLURM signals every process of a job step, a terminal and
    torchrun every process of a rank: it would end, and with it the save that the signal asks for. And a rank that is
    killed would leave it behind.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    resource_tracker.ensure_running()  # it unblocks signals when it starts
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SHIELDED)  # inherited: a signal may come before `shield` runs
    try:
        manager.start(shield)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    filesystem_async._results_queue = manager.Queue()
    if since(0, 17):
        _tell_causes(filesystem_async.FileSystemWriterAsync)


def _tell_causes(writer: Any) -> None:
    """Have a failed write of Megatron's tell its message: since 0.17 it tells the class of the error alone."""
    original = writer.write_preloaded_data

    @functools.wraps(original)
    def write(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        if found and isinstance(found[1], Exception):  # in the calling thread; others put theirs into a queue
            raise found[1]
        return found

    writer.write_preloaded_data = staticmethod(write)


def forget() -> None:
    """Drop the results of a save that failed before they were collected: the next one would take them for its own."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    name = "get_write_results_queue" if since(0, 17) else "_get_write_results_queue"
    queue = getattr(filesystem_async, name)()
    while not queue.empty():
        queue.get()


def shield() -> None:
    """Have this process go on when a job is signalled, and end with the one that started it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SHIELDED)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
