"""New weights, gathered from the replicas while the next forward pass goes on."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import nn


class Gathering:
    """Gathers each bucket of weights before the first module that reads it, and all further ones meanwhile.

    An optimizer step leaves each replica with new values of its own share alone. Megatron's own hooks fire where the
    module that holds a parameter is called; ours are read by others, so a hook stands before each layer as a whole.
    They also go by the zeroing of gradients, which here comes after the first forward pass of a step.
    """

    def __init__(self, model: DistributedDataParallel, units: Sequence[tuple[nn.Module, Sequence[nn.Parameter]]]):
        """units: in the order of their calls, (module, parameters that nothing reads before it is called)."""
        model.disable_forward_pre_hook(param_sync=False)
        bucket = model.param_to_bucket_group
        self._due = False
        self._groups: list[Any] = []  # Megatron's, in the order of their use
        for module, parameters in units:
            own = list(dict.fromkeys(bucket[p] for p in parameters))
            self._groups += [group for group in own if group not in self._groups]
            module.register_forward_pre_hook(partial(self._before, own))

    def owe(self) -> None:
        """Note that an optimizer step has been made: what parameters hold is old from here on."""
        self._due = True

    def finish(self) -> None:
        """Have all weights up to date, on all replicas at once. Nothing where they are."""
        self._start()
        self._wait(self._groups)

    def _before(self, groups: Sequence[Any], module: nn.Module, arguments: Any) -> None:
        self._start()
        self._wait(groups)

    @torch.no_grad()
    def _start(self) -> None:
        if self._due:
            self._due = False
            for group in self._groups:
                group.start_param_sync()

    def _wait(self, groups: Sequence[Any]) -> None:
        for group in groups:
            if group.param_gather_handle is not None:
                group.finish_param_sync(skip_next_bucket_dispatch=True)
