"""How the cost of a step grows with the length of its sequences."""

import statistics
from pathlib import Path

from megatron_refine.bench.step import Batches, shapes, steps
from megatron_refine.bench.timing import Timings
from megatron_refine.config import Config

KINDS = ("NTP", "fused")


def run(config: Config, rounds: int, lengths: list[int], plot: Path | None = None) -> str:
    """`rounds` steps at each length on one model, shortest first. The first rank's table, and a plot in `plot`."""
    import torch.distributed as dist

    from megatron_refine.trainer.parallel import init_parallel

    ranks, lines, found = init_parallel(config), list[str](), dict[str, list[tuple[int, float]]]()
    kinds = steps(config, ranks, KINDS)
    for length in sorted(lengths):
        own = config.model_copy(update={"data": config.data.model_copy(update={"seq_length": length})})
        batches = Batches(own, ranks)
        timed = {kind: (lambda i, step=step, batches=batches: step(batches(i), i)) for kind, step in kinds.items()}
        timings = Timings(timed, rounds, dist.barrier)
        tokens = length * config.train.global_batch_size
        for kind in KINDS:
            found.setdefault(kind, []).append((length, statistics.median(timings.seconds[kind])))
        each = "".join(f"{1e6 * found[kind][-1][1] / tokens:>14.1f}" for kind in KINDS)
        lines.append(f"{length:>8}{each}{timings.ratio('fused', 'NTP'):>14.3f}")
    if not ranks.is_main:
        return ""
    if plot:
        _draw(found, plot)
    head = f"{'T':>8}{'NTP':>14}{'fused':>14}{'fused / NTP':>14}   microseconds a token"
    return "\n".join([shapes(config, ranks.world, rounds), head, *lines])


def _draw(found: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Seconds over tokens, both logarithmic: a straight line of slope one is a cost linear in the length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for kind, points in found.items():
        axes.plot(*zip(*points, strict=True), "o-", label=kind)
    first, last = (found["NTP"][i] for i in (0, -1))
    axes.plot([first[0], last[0]], [first[1], first[1] * last[0] / first[0]], "--", color="gray", label="linear")
    axes.set(xscale="log", yscale="log", xlabel="tokens of a sequence", ylabel="seconds a step")
    ticks = [length for length, _ in found["NTP"]]
    axes.set_xticks(ticks, [f"{t // 1024}K" if t % 1024 == 0 else str(t) for t in ticks])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
