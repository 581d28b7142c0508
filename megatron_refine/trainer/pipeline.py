"""Passes without gradient across pipeline stages, outside of Megatron's schedules: from stage to stage, in order."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_refine.trainer.model import RefineModel


class Link:
    """This stage's place in the pipeline. What it sends may still be on its way: `wait` before the tensors go."""

    def __init__(self, model: RefineModel):
        self.model, self.group = model, model.pg_collection.pp
        self.stage, self.last = self.group.rank(), self.group.size() - 1
        self._sent: list[tuple[Any, Tensor]] = []

    def through(self, run: Callable[[], Any], rows: int, batch: int) -> Any:
        """`run()` on the rows of the stage before; what it returns goes to the next stage.

        Args: rows, the length on every rank: [rows, batch, hidden] travels.
        Returns: the output of the last stage, None on others.
        """
        config = self.model.config
        if self.stage:
            shape = rows, batch, config.hidden_size
            self.model.set_input_tensor(self.receive(shape, config.params_dtype, self.stage - 1))
        output = run()
        if self.stage == self.last:
            return output
        self.send(output, self.stage + 1)
        return None

    def send(self, value: Tensor, stage: int) -> None:
        value = value.contiguous()
        self._sent.append((dist.isend(value, group_dst=stage, group=self.group), value))

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, stage: int) -> Tensor:
        value = torch.empty(shape, dtype=dtype, device=next(self.model.parameters()).device)
        dist.recv(value, group_src=stage, group=self.group)
        return value

    def wait(self) -> None:
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()
