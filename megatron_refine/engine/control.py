"""Agreement of all ranks on what each did alone, with a deadline."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_refine.engine.errors import ServerError
from megatron_refine.exchange import everyone

T = TypeVar("T")


class Control:
    """A gloo group of all ranks. Every rank makes the same calls in the same order."""

    def __init__(self, seconds: float):
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        return everyone(value, self._group)

    def attempt(self, work: Callable[[], T]) -> list[T]:
        """Every rank does its part; every rank's result. Raises the same ServerError on all ranks if one failed."""
        try:
            value, error = work(), None
        except Exception as failure:  # whatever it is, the others must not wait for this rank
            value, error = None, f"rank {dist.get_rank()}: {' '.join(str(failure).split()) or type(failure).__name__}"
        found = self.gather((value, error))
        failures = [message for _, message in found if message]
        if failures:
            raise ServerError(failures[0])
        return [result for result, _ in found]
