"""Weights to an SGLang server, beside plain broadcasts of as many bytes to a process that only receives them."""

import math
import multiprocessing
import statistics
import time
from collections.abc import Callable

from megatron_refine import usage
from megatron_refine.bench.timing import WARM_UP
from megatron_refine.config import Config


def run(config: Config, rounds: int) -> str:
    """`rounds` plain broadcasts and syncs in turn. Returns the first rank's table."""
    import torch.distributed as dist

    from megatron_refine.engine.sglang import SGLangEngine
    from megatron_refine.platform import hardware
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
    if not ranks.is_main:
        return ""
    return _bandwidths(config, ranks.world, hardware.backend(), total, plain[WARM_UP:], synced[WARM_UP:])


def _plain_broadcast(total: int, size: int, rounds: int) -> Callable[[], float]:
    """A function that sends `total` bytes, `size` at a time, to a process that only receives; its seconds."""
    import torch
    import torch.distributed as dist

    from megatron_refine.platform import rendezvous

    store = rendezvous.GroupStore("127.0.0.1", 600.0)
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

    from megatron_refine.platform import rendezvous

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = rendezvous.GroupStore("127.0.0.1", 600.0, port).join("plain", 2, rank=1)
    weights = torch.zeros(total, dtype=torch.uint8)
    for _ in range(rounds):
        dist.barrier(group)
        for part in weights.split(size):
            dist.broadcast(part, group_src=0, group=group)
        dist.barrier(group)


def _bandwidths(c: Config, world: int, backend: str, size: int, plain: list[float], synced: list[float]) -> str:
    ratio = statistics.median(a / b for a, b in zip(plain, synced, strict=True))
    lines = [
        f"{c.model.family} hidden {c.model.hidden_size}, {c.model.num_layers} layers, {size / 1e6:.0f} MB of "
        f"{c.train.precision}; {usage.ranks(world)}, tp {c.parallel.tp}; {backend}; medians of {len(plain)}"
    ]
    for name, seconds in {"broadcast": plain, "sync": synced}.items():
        middle = statistics.median(seconds)
        lines.append(f"{name:<10}{middle:>8.3f} s  {size / middle / 1e9:>6.2f} GB/s  (fastest {min(seconds):.3f} s)")
    return "\n".join([*lines, f"a sync has {ratio:.0%} of the bandwidth of a broadcast: median of the rounds"])
