"""How far something long has come: a bar on a terminal, a plain line every half minute where there is none."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

EVERY = 30.0  # seconds between two plain lines
T = TypeVar("T")


class Progress:
    """Counts what is done, on standard error. A context manager; says nothing of what takes less than a second."""

    def __init__(self, label: str, total: int | None, unit: str, done: int = 0, show: bool = True):
        self.label, self.total, self.unit, self.done = label, total, unit, done
        self._start = self._said = time.monotonic()
        self._bar = None
        if show and sys.stderr.isatty():
            from tqdm import tqdm  # late: takes a moment

            # miniters: what comes in bursts would make it look away for long
            self._bar = tqdm(desc=label, total=total, unit=f" {unit}", initial=done, delay=1, miniters=1, leave=False)
        self._plain = show and self._bar is None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, count: int = 1) -> None:
        """Tell that `count` more are done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._plain and time.monotonic() - self._said >= EVERY:
            self._said = time.monotonic()
            of = f" of {self.total:,}" if self.total else ""
            print(f"{self.label}: {self.done:,}{of} {self.unit}, {self._said - self._start:.0f} s", file=sys.stderr)


def counted(items: Iterable[T], label: str, total: int | None, unit: str, show: bool = True) -> Iterator[T]:
    """Yield the items and count those that are done with."""
    with Progress(label, total, unit, show=show) as progress:
        for item in items:
            yield item
            progress.add()


class Line:
    """A line on standard error whose text changes: in place on a terminal, else anew every half minute."""

    def __init__(self) -> None:
        self._terminal, self._said, self._width = sys.stderr.isatty(), -EVERY, 0

    def show(self, text: str) -> None:
        """Put `text` in place of what the line says."""
        if self._terminal:
            print(f"\r{text:<{self._width}}", end="", file=sys.stderr, flush=True)
            self._width = len(text)
        elif time.monotonic() - self._said >= EVERY:
            self._said = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def end(self, text: str) -> None:
        """Say `text` last."""
        print(f"\r{text:<{self._width}}" if self._terminal else text, file=sys.stderr, flush=True)
