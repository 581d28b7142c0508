"""Between steps the ranks agree whether to go on, to save, or to save and end.

Ctrl-C, SIGTERM, SIGUSR1 and the end of a SLURM job end the run; a save becomes due by the clock.
"""

import enum
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

import torch
import torch.distributed as dist

from megatron_refine import launcher
from megatron_refine.errors import FencedError
from megatron_refine.platform import hardware
from megatron_refine.platform.megatron.saves import STOP_SIGNALS
from megatron_refine.run import interrupt


class Verdict(enum.IntEnum):
    """What the ranks do after a step; the highest of theirs counts."""

    GO_ON, SAVE, STOP, FENCED = range(4)

    @property
    def stops(self) -> bool:
        return self >= Verdict.STOP


class StopRequest:
    """Why this process should stop, if it should."""

    def __init__(self, fenced: Callable[[], bool], needed: Callable[[], float], due: Callable[[], bool]):
        """fenced(): whether another attempt has taken over; needed(): seconds that the next step and save may take;
        due(): whether it is time for a save."""
        self.name, self.fenced, self.needed, self.due = "", fenced, needed, due
        self.end = launcher.read().end
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)
        # SLURM signals every process of a step: what helps with a save must outlive that, and inherits this mask.
        # Not SIGTERM, which multiprocessing unblocks (platform/megatron/saves.py)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        threading.Thread(target=self._await, daemon=True, name="signals").start()

    def hear_interrupts(self) -> None:
        """Hear Ctrl-C from now on, as there is something to save: the first asks to stop."""
        interrupt.ask_first(lambda: self._note(signal.SIGINT, None))

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM and launcher.under_torchrun():
            interrupt.again()  # what torchrun makes of a second Ctrl-C
        self.name = signal.Signals(number).name

    def _await(self) -> None:
        while True:
            self._note(signal.sigwait({signal.SIGUSR1}), None)

    def agreed(self) -> Verdict:
        """What the ranks do now, FENCED aside. Collective: a signal may reach ranks between different steps.

        Raises FencedError on every rank where another attempt has taken over.
        """
        if not self.name and time.time() + self.needed() > self.end:
            self.name = "the end of the job's time"
        verdict = Verdict.STOP if self.name else Verdict.SAVE if self.due() else Verdict.GO_ON
        highest = torch.tensor([float(Verdict.FENCED if self.fenced() else verdict)], device=hardware.device())
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        found = Verdict(int(highest.item()))
        if found is Verdict.FENCED:
            raise FencedError("another attempt has taken over (OWNER in the run's folder); this one writes no more")
        return found
