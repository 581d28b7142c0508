"""What the benchmarks share: rounds of all kinds in turn, medians, and the bytes that a graph keeps."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from megatron_refine.platform import hardware

WARM_UP = 2  # rounds that do not count: caches, memory, connections


class Timings:
    """Seconds of each kind, round by round."""

    def __init__(
        self,
        kinds: Mapping[str, Callable[[int], object]],
        rounds: int,
        begin: Callable[[], object] = int,
        warm_up: int = WARM_UP,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Run the kinds in turn, `rounds` times and `warm_up` before, each told the round; `begin` before each.

        clock: seconds; time.process_time on a CPU that others use too.
        """
        self.seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for i in range(-warm_up, rounds):
            for kind, run in kinds.items():
                begin()
                start = clock()
                run(i + warm_up)
                hardware.synchronize()
                if i >= 0:
                    self.seconds[kind].append(clock() - start)

    def ratio(self, kind: str, base: str) -> float:
        """Median over rounds of the seconds of two kinds that ran side by side."""
        return statistics.median(a / b for a, b in zip(self.seconds[kind], self.seconds[base], strict=True))

    def table(self, base: str, more: Mapping[str, str] | None = None) -> str:
        """A line a kind: median and least seconds, both divided by those of `base`; `more` is added to it."""
        width = max(map(len, self.seconds))
        lines = [f"{'':<{width}}{'seconds':>10}{'fastest':>10}{f'/ {base}':>12}{'fastest':>10}"]
        for kind, found in self.seconds.items():
            fastest = min(found) / min(self.seconds[base])
            line = f"{kind:<{width}}{statistics.median(found):>10.4f}{min(found):>10.4f}{self.ratio(kind, base):>12.3f}"
            lines.append(f"{line}{fastest:>10.3f}   {(more or {}).get(kind, '')}".rstrip())
        return "\n".join(lines)


def saved_bytes(run: Callable[[], object]) -> int:
    """Bytes of all tensors that autograd keeps for the backward passes within `run`, each storage once."""
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is given out twice

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in kept.values())
