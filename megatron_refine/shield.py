"""The process that Megatron's saves collect their results in: it outlives signals to a job, and not its rank.

It is spawned anew, so this module imports nothing heavy.
"""

import ctypes
import functools
import multiprocessing
import signal
from multiprocessing.managers import SyncManager

PR_SET_PDEATHSIG = 1  # of prctl(2)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@functools.cache
def shield_saves() -> None:
    """Start it, once, instead of Megatron.

    Megatron starts it with its first save and keeps it. SLURM signals every process of a job step: it would end, and
    with it the save that the signal asks for. And a rank that is killed would leave it behind.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    manager.start(_shielded)
    filesystem_async._results_queue = manager.Queue()


def _shielded() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
