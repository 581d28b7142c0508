"""Seconds of each stage of a step."""

import contextlib
import time
from collections.abc import Iterator

from megatron_refine import platform


class Clock:
    """Adds up wall-clock seconds by stage name. Stages nest: a second counts for the innermost one alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner: list[float] = []  # seconds of stages inside each open one
        self.stage = ""  # the one begun last

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start, self.stage = time.perf_counter(), stage
        self._inner.append(0.0)
        try:
            yield
        finally:
            platform.synchronize()  # so that a stage holds its own work
            elapsed = time.perf_counter() - start
            self.seconds[stage] = self.seconds.get(stage, 0.0) + elapsed - self._inner.pop()
            if self._inner:
                self._inner[-1] += elapsed

    def take(self) -> dict[str, float]:
        """The seconds since the last call, as metrics; starts again from zero."""
        seconds, self.seconds = self.seconds, {}
        return {f"time/{stage}": value for stage, value in seconds.items()}
