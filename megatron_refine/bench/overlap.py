"""What data parallelism costs a step: with its communication between the passes, beside them, and left out."""

import statistics
from collections.abc import Callable
from typing import Any

from megatron_refine.bench.step import Batches, shapes
from megatron_refine.bench.timing import Timings
from megatron_refine.config import Config, ConfigError

NONE, AFTER, BESIDE = "without", "between", "beside"


def run(config: Config, rounds: int) -> str:
    """`rounds` steps of each kind, each on a model of its own. Returns the first rank's table.

    Raises ConfigError where there is one replica alone.
    """
    import torch.distributed as dist

    from megatron_refine.trainer.parallel import init_parallel

    ranks = init_parallel(config)
    if ranks.replica_group.size() == 1:
        raise ConfigError("overlap: needs several replicas; start it by torchrun on more ranks, or lower parallel.*")
    batches = Batches(config, ranks)
    kinds = {kind: _step(config, ranks, kind) for kind in (NONE, AFTER, BESIDE)}

    def timed(kind: str) -> Callable[[int], object]:
        return lambda i: kinds[kind](batches(i), i, config.refine.enabled)

    timings = Timings({kind: timed(kind) for kind in kinds}, rounds, dist.barrier)
    if not ranks.is_main:
        return ""
    exposed = {kind: 1e3 * _beyond(timings, kind) for kind in (AFTER, BESIDE)}
    return "\n".join([
        shapes(config, ranks.world, rounds),
        timings.table(NONE),
        f"exposed communication: {exposed[AFTER]:.0f} ms between the passes, {exposed[BESIDE]:.0f} ms beside them; "
        "medians of the rounds' differences",
    ])  # fmt: skip


def _beyond(timings: Timings, kind: str) -> float:
    """Seconds that a kind takes longer than without communication."""
    pairs = zip(timings.seconds[kind], timings.seconds[NONE], strict=True)
    return statistics.median(seconds - least for seconds, least in pairs)


def _step(config: Config, ranks: Any, kind: str) -> Any:
    from megatron_refine.engine.native import NativeEngine
    from megatron_refine.step.refine import RefineStep
    from megatron_refine.trainer.model import build_model
    from megatron_refine.trainer.optimizer import Updater

    train = config.train.model_copy(update={"overlap": "true" if kind == BESIDE else "false"})
    own = config.model_copy(update={"train": train})
    model = build_model(own, ranks)
    if kind == NONE:  # each replica learns from its own gradient, and from a share of it
        for group in model.bucket_groups:
            group.start_grad_sync = group.finish_grad_sync = group.start_param_sync = _nothing
    return RefineStep(own, model, NativeEngine(model), Updater(own, model, ranks), ranks)


def _nothing(*_: Any, **__: Any) -> None:
    pass
