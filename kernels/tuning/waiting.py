"""The line on the screen while Triton compiles."""

import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from megatron_refine import launcher
from megatron_refine.progress import Line

DELAY = 1.0  # seconds: what lies in the cache is there sooner, and nothing is said of it


class Waiting:
    """Counts the kernels that were announced, and names how many are left while one takes long.

    It hears of them through the hooks that Triton calls before and after each compilation, of every process the first.
    """

    def __init__(self) -> None:
        self.left: Counter[str] = Counter()  # kernel -> compilations
        self._line: Line | None = None
        self._timer: threading.Timer | None = None
        self._begun = 0.0

    def expect(self, kernels: Mapping[str, int]) -> None:
        """Announce kernels, each with the number of its candidates."""
        if not launcher.speaks():
            return
        from triton import knobs

        self.left.update(kernels)
        if knobs.runtime.jit_cache_hook is None and knobs.runtime.jit_post_compile_hook is None:
            knobs.runtime.jit_cache_hook, knobs.runtime.jit_post_compile_hook = self._before, self._after

    def _before(self, *, fn: Any, **_: Any) -> None:
        """fn: Triton's module and name of the kernel. What it returns is false: Triton goes on."""
        self._timer = threading.Timer(DELAY, self._say, (fn.name,))
        self._timer.daemon = True
        self._timer.start()

    def _after(self, *, fn: Any, **_: Any) -> None:
        if self._timer:
            self._timer.cancel()
        name = f"{fn.module}.{fn.name}".partition(".")[2]
        if self.left[name] > 1:
            self.left[name] -= 1
        else:
            del self.left[name]
        if self._line and not self.left:
            self._line.end(f"kernels compiled in {time.monotonic() - self._begun:.0f} s; they are kept for later runs")
            self._line = None

    def _say(self, name: str) -> None:
        if self._line is None:
            self._line, self._begun = Line(), time.monotonic() - DELAY
        count = max(1, self.left.total())
        self._line.show(f"compiling the GPU's kernels, {count} left: {name}")
