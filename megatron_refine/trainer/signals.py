"""Between steps the ranks agree whether to go on: SIGTERM, SIGUSR1 and the end of a SLURM job ask for a save."""

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

import torch
import torch.distributed as dist

from megatron_refine import launcher, platform
from megatron_refine.shield import STOP_SIGNALS
from megatron_refine.trainer.errors import FencedError

_GO_ON, _STOP, _FENCED = 0, 1, 2


class StopRequest:
    """Why this process should stop, if it should."""

    def __init__(self, fenced: Callable[[], bool], needed: Callable[[], float]):
        """fenced(): whether another attempt has taken over; needed(): seconds that the next step and save may take."""
        self.name, self.fenced, self.needed = "", fenced, needed
        self.end = launcher.read().end
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)
        # SLURM signals every process of a step: what helps with a save must outlive that, and inherits this mask.
        # Not SIGTERM, which multiprocessing unblocks (shield.py)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        threading.Thread(target=self._await, daemon=True, name="signals").start()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name

    def _await(self) -> None:
        while True:
            self._note(signal.sigwait({signal.SIGUSR1}), None)

    def agreed(self) -> bool:
        """Whether any rank should stop. Collective: a signal may reach ranks between different steps.

        Raises FencedError on every rank where another attempt has taken over.
        """
        if not self.name and time.time() + self.needed() > self.end:
            self.name = "the end of the job's time"
        verdict = _FENCED if self.fenced() else _STOP if self.name else _GO_ON
        highest = torch.tensor([float(verdict)], device=platform.device())
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        if highest.item() == _FENCED:
            raise FencedError(
                "another attempt has taken the run over (OWNER in its folder); this one writes nothing more"
            )
        return highest.item() >= _STOP
