"""Seconds of each stage of a step."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_refine.platform import hardware


@dataclass
class _Span:
    """A stage from a moment to another, and the stages inside of it."""

    stage: str
    begin: Any
    end: Any = None
    inner: list["_Span"] = field(default_factory=list)

    def seconds(self) -> float:
        return hardware.seconds_between(self.begin, self.end)


class Clock:
    """Adds up seconds by stage name. Stages nest: a second counts for the innermost one alone.

    The moments are marked on the device, between the work of two stages, and read at the end: no stage waits for the
    device. On a CPU they are those of the wall clock.
    """

    def __init__(self) -> None:
        self._ended: list[_Span] = []
        self._open: list[_Span] = []
        self.stage = ""  # the one begun last

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        span = _Span(stage, hardware.moment())
        self.stage = stage
        if self._open:
            self._open[-1].inner.append(span)
        self._open.append(span)
        try:
            yield
        finally:
            span.end = hardware.moment()
            self._open.pop()
            self._ended.append(span)

    def take(self) -> dict[str, float]:
        """The seconds since the last call, as metrics; starts again from zero. Waits for the device."""
        ended, self._ended = self._ended, []
        hardware.synchronize()
        found: dict[str, float] = {}
        for span in ended:
            own = span.seconds() - sum(inner.seconds() for inner in span.inner)
            found[span.stage] = found.get(span.stage, 0.0) + own
        return {f"time/{stage}": seconds for stage, seconds in found.items()}
