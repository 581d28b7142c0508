"""The compiling of a configuration's kernels by several processes, and the table of what they found."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_refine.config import ConfigError
from megatron_refine.progress import Progress
from megatron_refine.warm.passes import KINDS

Row = dict[str, Any]  # a `driver.Binary` as JSON


def warm(
    files: Sequence[str], overrides: Sequence[str], architecture: str, kinds: Sequence[str], pinned: bool, jobs: int
) -> list[Row]:
    """Compile the kernels of a configuration's passes into TRITON_CACHE_DIR. Raises ConfigError where it fails.

    pinned: of each kernel the candidate that is pinned for its shape, where one is; else all candidates.
    """
    # a GPU that is there stays out of it, and no timing of a launch that does nothing may be kept as a result
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "FLA_CACHE_RESULTS": "0", "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    with contextlib.ExitStack() as ending:
        folder = Path(ending.enter_context(tempfile.TemporaryDirectory(prefix="kernels-")))
        request = {
            "files": [*files], "overrides": [*overrides], "architecture": architecture, "kinds": [*kinds],
            "pinned": pinned, "claims": str(folder),
        }  # fmt: skip
        line = [sys.executable, "-m", "megatron_refine.warm.worker", json.dumps(request)]
        progress = ending.enter_context(Progress("compiling", None, "kernels"))
        workers = [Worker(line, environment, progress) for _ in range(jobs)]
        for worker in workers:
            ending.callback(worker.end)
        return [row for worker in workers for row in worker.rows()]


class Worker:
    """A process that compiles its share."""

    def __init__(self, line: list[str], environment: dict[str, str], progress: Progress):
        self._progress, self._rows, self._errors = progress, list[Row](), list[str]()
        self._process = subprocess.Popen(
            line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
        )
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read, self._read_errors)]
        for reader in self._readers:
            reader.start()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            found = json.loads(line) if line.startswith("{") else {}
            self._rows += found.get("binaries", [])
            self._progress.add("kernel" in found)

    def _read_errors(self) -> None:
        assert self._process.stderr
        self._errors += self._process.stderr

    def rows(self) -> list[Row]:
        """What it compiled, when it is done. Raises ConfigError where it failed."""
        for reader in self._readers:
            reader.join()
        if self._process.wait():
            last = next((text.strip() for text in reversed(self._errors) if text.strip()), "no message")
            raise ConfigError(f"kernels: a process that compiles ended with code {self._process.returncode}: {last}")
        return self._rows

    def end(self) -> None:
        """End the process if it still runs."""
        self._process.kill()
        self._process.wait()


def table(rows: Sequence[Row], seconds: float, jobs: int) -> str:
    """A line a kernel: candidates, CPU seconds, and the most that one of them takes; then the sums."""
    kernels = dict.fromkeys(sorted(row["kernel"] for row in rows))
    short = {name: name.rpartition(".")[2] for name in kernels}
    width = max(map(len, short.values()), default=6)
    head = f"{'kernel':<{width}}  passes    candidates  compiled  seconds  longest  "
    head += "shared KiB  registers  spill  refused"
    lines = [head]
    for name in kernels:
        mine = [row for row in rows if row["kernel"] == name]
        fresh = [row["seconds"] for row in mine if not row["hit"]]
        kinds = "".join(kind[0] for kind in KINDS if kind in {r["kind"] for r in mine})
        lines.append(
            f"{short[name]:<{width}}  {kinds:<6}{len(mine):>14}{len(fresh):>10}{sum(fresh):>9.1f}"
            f"{max(fresh, default=0):>9.1f}{max(r['shared'] for r in mine) / 1024:>12.0f}"
            f"{max(r['registers'] for r in mine):>11}{sum(r['spilled'] > 0 for r in mine):>7}"
            f"{sum(r['refused'] for r in mine):>9}"
        )
    fresh = [row["seconds"] for row in rows if not row["hit"]]
    lines.append(
        f"{len(rows)} candidates of {len(kernels)} kernels: {len(fresh)} compiled, {len(rows) - len(fresh)} in the "
        f"cache; {sum(fresh):.0f} CPU s, {seconds:.0f} s by {jobs} processes; "
        f"{sum(r['spilled'] > 0 for r in rows)} spill, {sum(r['refused'] for r in rows)} refused: more shared memory "
        "than the card has"
    )
    return "\n".join(lines)
