"""SIGTERM and SIGUSR1 ask the run to finish its step, save and exit."""

import signal
from types import FrameType

import torch
import torch.distributed as dist

from megatron_refine import platform

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers that this process was asked to stop; the ranks agree on it between steps."""

    def __init__(self) -> None:
        self.name = ""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. Collective: a signal may reach the ranks between different steps."""
        asked = torch.tensor([float(bool(self.name))], device=platform.device())
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked.item())
