"""Where the time of a step goes: the hottest operators of the CPU, or kernels of the GPU, by torch's profiler."""

from typing import Any

from megatron_refine.bench.step import Batches, shapes, steps
from megatron_refine.bench.timing import WARM_UP
from megatron_refine.config import Config
from megatron_refine.platform import hardware

KINDS = ("NTP", "fused")
PLACES, WIDTH = 10, 64


def run(config: Config, rounds: int) -> str:
    """`rounds` steps of each kind under the profiler, after two that warm up. The first rank's tables."""
    from torch.profiler import ProfilerActivity, profile

    from megatron_refine.trainer.parallel import init_parallel

    ranks = init_parallel(config)
    batches, kinds = Batches(config, ranks), steps(config, ranks, KINDS)
    gpu = hardware.has_gpu()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    tables = [shapes(config, ranks.world, rounds).replace("medians of", "steps profiled:")]
    for kind, step in kinds.items():
        for i in range(WARM_UP):
            step(batches(i), i)
        hardware.synchronize()
        with profile(activities=activities, acc_events=True) as profiler:
            for i in range(WARM_UP, WARM_UP + rounds):
                step(batches(i), i)
            hardware.synchronize()
        tables.append(_hottest(kind, profiler.key_averages(), gpu))
    return "\n\n".join(tables) if ranks.is_main else ""


def _hottest(kind: str, events: Any, gpu: bool) -> str:
    """The ten places with the most time of their own, without what they call."""
    from torch.autograd import DeviceType

    if gpu:  # kernels alone: the operators that launched them count the same time again
        times = {e.key: (e.self_device_time_total, e.count) for e in events if e.device_type == DeviceType.CUDA}
    else:
        times = {e.key: (e.self_cpu_time_total, e.count) for e in events}
    total = sum(time for time, _ in times.values())
    hottest = sorted(times.items(), key=lambda item: -item[1][0])[:PLACES]
    lines = [f"{name[:WIDTH]:<{WIDTH}}{time / total:>8.1%}{count:>9}" for name, (time, count) in hottest]
    return "\n".join([f"{kind + ', ' + ('kernels' if gpu else 'operators'):<{WIDTH}}{'share':>8}{'calls':>9}", *lines])
