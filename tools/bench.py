"""Benchmarks. All kinds are taken in turn in one process, so that a machine whose speed drifts slows all of them alike.

    torchrun --nproc-per-node 2 tools/bench.py step --config FILE [--rounds 12] [key.sub=value ...]

prints the seconds of an NTP-only step, a fused and a two-pass REFINE step on the same batches, and their ratios.

    torchrun --nproc-per-node 1 tools/bench.py sync --config FILE [--rounds 12] [key.sub=value ...]

prints the bandwidth of weight syncs to an SGLang server, and of plain broadcasts of as many bytes to a process that
only receives them.
"""

import argparse
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron_refine import config as configuration
from megatron_refine.models.family import FAMILIES

if TYPE_CHECKING:
    from megatron_refine.records import Batch

KINDS = {"NTP": None, "fused": "fused", "two-pass": "two_pass"}
WARM_UP = 2  # rounds that do not count: caches, memory, connections


def main(arguments: list[str]) -> int:
    """Run a benchmark. Returns the exit code: 0, or 2 where the configuration or the data are wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("benchmark", choices=["step", "sync"], help="step: training steps; sync: weights to a server")
    parser.add_argument("--config", required=True, action="append", metavar="FILE", help="a YAML file; later ones win")
    parser.add_argument("--rounds", type=int, default=12, help="steps of each kind (default: 12)")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values that replace the file's")
    options = parser.parse_intermixed_args(arguments)
    try:
        config = configuration.load(options.config, options.overrides, FAMILIES)
        return {"step": _steps, "sync": _syncs}[options.benchmark](config, options.rounds)
    except configuration.ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            print(error, file=sys.stderr)
        return 2


def _steps(config: configuration.Config, rounds: int) -> int:
    """`rounds` steps of each kind on one model, which goes on learning from all of them."""
    import torch.distributed as dist

    from megatron_refine.data.order import rank_samples, sample_rows
    from megatron_refine.data.prepare import prepare
    from megatron_refine.trainer.parallel import init_parallel

    if os.environ.get("RANK", "0") == "0":
        prepare(config)
    ranks = init_parallel(config)
    dist.barrier()
    rows, size = prepare(config).train, config.train.global_batch_size
    kinds = _kinds(config, ranks)
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    stages: dict[str, dict[str, list[float]]] = {kind: {} for kind in kinds}
    for i in range(-WARM_UP, rounds):
        first = (i + WARM_UP) * size
        samples = rank_samples(first, size, config.mini_batch_size, ranks.dp_rank, ranks.dp)
        batch = rows.batch(sample_rows(config.run.seed, first, size, len(rows))[samples - first], samples)
        for kind, run in kinds.items():
            dist.barrier()
            start = time.perf_counter()
            metrics = run(batch, i + WARM_UP)
            if i >= 0:
                seconds[kind].append(time.perf_counter() - start)
                for name in (n for n in metrics if n.startswith("time/")):
                    stages[kind].setdefault(name[5:], []).append(metrics[name])
    if ranks.is_main:
        print(_shapes(config, ranks.world, rounds))
        print(_table(seconds, stages))
    dist.destroy_process_group()
    return 0


def _syncs(config: configuration.Config, rounds: int) -> int:
    """`rounds` plain broadcasts and syncs in turn."""
    import torch.distributed as dist

    from megatron_refine import platform
    from megatron_refine.engine.sglang import SGLangEngine
    from megatron_refine.trainer.model import build_model
    from megatron_refine.trainer.parallel import init_parallel

    ranks = init_parallel(config)
    model = build_model(config, ranks)
    engine = SGLangEngine(config, model, ranks, print if ranks.is_main else lambda line: None)
    total = sum(math.prod(shape) for shape in engine.converter.hf_shapes.values()) * next(model.parameters()).itemsize
    broadcast = _plain_broadcast(total, engine.bucket_bytes, rounds) if ranks.is_main else lambda: 0.0
    plain: list[float] = []
    synced: list[float] = []
    try:
        engine.sync(0)
        for i in range(1, rounds + WARM_UP + 1):
            plain.append(broadcast())
            dist.barrier()
            engine.metrics()
            engine.sync(i)
            synced.append(engine.metrics()["engine/transfer_seconds"])
    finally:
        engine.close()
    if ranks.is_main:
        print(_bandwidths(config, ranks.world, platform.backend(), total, plain[WARM_UP:], synced[WARM_UP:]))
    dist.destroy_process_group()
    return 0


def _plain_broadcast(total: int, size: int, rounds: int) -> Callable[[], float]:
    """A function that sends `total` bytes, `size` at a time, to a process that only receives; its seconds."""
    import torch
    import torch.distributed as dist

    from megatron_refine import platform

    store = platform.GroupStore("127.0.0.1", 600.0)
    arguments = (store.port, total, size, rounds + WARM_UP)
    multiprocessing.get_context("spawn").Process(target=_receive, args=arguments, daemon=True).start()
    group, weights = store.join("plain", 2), torch.randint(0, 255, (total,), dtype=torch.uint8)

    def broadcast() -> float:
        dist.barrier(group)
        start = time.perf_counter()
        for part in weights.split(size):
            dist.broadcast(part, group_src=0, group=group)
        dist.barrier(group)
        return time.perf_counter() - start

    return broadcast


def _receive(port: int, total: int, size: int, rounds: int) -> None:
    """The other end of the plain broadcasts: it takes them into memory that it keeps."""
    import torch
    import torch.distributed as dist

    from megatron_refine import platform

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = platform.GroupStore("127.0.0.1", 600.0, port).join("plain", 2, rank=1)
    weights = torch.zeros(total, dtype=torch.uint8)
    for _ in range(rounds):
        dist.barrier(group)
        for part in weights.split(size):
            dist.broadcast(part, group_src=0, group=group)
        dist.barrier(group)


def _bandwidths(
    c: configuration.Config, world: int, backend: str, size: int, plain: list[float], synced: list[float]
) -> str:
    ratio = statistics.median(a / b for a, b in zip(plain, synced, strict=True))
    lines = [
        f"{c.model.family} hidden {c.model.hidden_size}, {c.model.num_layers} layers, {size / 1e6:.0f} MB of "
        f"{c.train.precision}; {world} ranks, tp {c.parallel.tp}; {backend}; medians of {len(plain)}"
    ]
    for name, seconds in {"broadcast": plain, "sync": synced}.items():
        middle = statistics.median(seconds)
        lines.append(f"{name:<10}{middle:>8.3f} s  {size / middle / 1e9:>6.2f} GB/s  (fastest {min(seconds):.3f} s)")
    return "\n".join([*lines, f"a sync has {ratio:.0%} of the bandwidth of a broadcast: median of the rounds"])


def _kinds(config: configuration.Config, ranks: Any) -> dict[str, Callable[["Batch", int], dict[str, float]]]:
    """What takes a step of each kind: all on the same model and optimizer."""
    from megatron_refine import platform
    from megatron_refine.engine.native import NativeEngine
    from megatron_refine.step.refine import RefineStep
    from megatron_refine.trainer.model import build_model
    from megatron_refine.trainer.optimizer import Updater

    model = build_model(config, ranks)
    updater = Updater(config, model, ranks)

    def kind(mode: str | None) -> Callable[["Batch", int], dict[str, float]]:
        update = config.update.model_copy(update={"mode": mode or "auto"})
        step = RefineStep(config.model_copy(update={"update": update}), model, NativeEngine(model), updater, ranks)

        def run(batch: "Batch", index: int) -> dict[str, float]:
            metrics = step(batch.to(platform.device()), index, refine=mode is not None)
            platform.synchronize()
            return metrics

        return run

    return {name: kind(mode) for name, mode in KINDS.items()}


def _shapes(c: configuration.Config, world: int, rounds: int) -> str:
    p, r, m = c.parallel, c.refine, c.model
    return (
        f"{m.family} hidden {m.hidden_size}, {m.num_layers} layers, vocabulary {m.vocab_size}; batch "
        f"{c.train.global_batch_size} x {c.data.seq_length}; c {r.num_chunks} n {r.num_rollouts} k {r.rollout_len}; "
        f"{world} ranks, tp {p.tp}{' sp' if p.sp else ''}; {c.train.precision}; medians of {rounds}"
    )


def _table(seconds: dict[str, list[float]], stages: dict[str, dict[str, list[float]]]) -> str:
    """Medians; the ratio to NTP is the median over rounds of steps that ran side by side."""
    lines = [f"{'':<10}{'seconds':>9}{'fastest':>9}{'/ NTP':>8}{'fastest':>9}   stages in ms"]
    base = seconds["NTP"]
    for kind, found in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(found, base, strict=True))
        parts = "  ".join(f"{name} {1e3 * statistics.median(s):.0f}" for name, s in stages[kind].items())
        lines.append(
            f"{kind:<10}{statistics.median(found):>9.3f}{min(found):>9.3f}{ratio:>8.2f}"
            f"{min(found) / min(base):>9.2f}   {parts}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
