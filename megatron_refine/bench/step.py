"""Seconds of an NTP-only step, of fused and two-pass REFINE steps, and of the official scheme, on the same batches."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from megatron_refine import usage
from megatron_refine.bench.baseline import Ratios, Record
from megatron_refine.bench.timing import Timings, saved_bytes
from megatron_refine.config import Config
from megatron_refine.records import Batch

KINDS = {"NTP": None, "fused": "fused", "two-pass": "two_pass"}
OFFICIAL, HF = "official", "fla NTP"


def run(config: Config, rounds: int, official: bool = False, hf: bool = False, record: Record | None = None) -> str:
    """`rounds` steps of each kind on one model, which goes on learning from all of them. The first rank's table.

    On one rank, with `official` its scheme is one of the kinds (one optimizer step a batch), with `hf` an NTP step of
    flash-linear-attention's model. The ratios go to `record`.
    """
    import torch.distributed as dist

    from megatron_refine.trainer.parallel import init_parallel

    ranks = init_parallel(config)
    batches = Batches(config, ranks)
    kinds = steps(config, ranks, [*KINDS, OFFICIAL] if official else [*KINDS])
    if hf:
        from megatron_refine.bench.hf import ntp_step

        kinds[HF] = ntp_step(config)
    stages = dict[str, dict[str, list[float]]]()

    def timed(kind: str) -> Callable[[int], None]:
        def step(i: int) -> None:
            metrics = kinds[kind](batches(i), i)
            for name in (n for n in metrics if n.startswith("time/")):
                stages.setdefault(kind, {}).setdefault(name[5:], []).append(metrics[name])

        return step

    timings = Timings({kind: timed(kind) for kind in kinds}, rounds, dist.barrier)
    kept = {kind: saved_bytes(lambda kind=kind: kinds[kind](batches(0), 0)) for kind in KINDS}  # type: ignore[misc]
    if not ranks.is_main:
        return ""
    if record:
        record.keep(ratios(timings, kept), rounds)
    notes = {kind: _note(stages.get(kind, {}), kept.get(kind), kept["NTP"]) for kind in kinds}
    speeds = (_speed(config, ranks.world, kind, statistics.median(timings.seconds[kind])) for kind in KINDS)
    tables = [shapes(config, ranks.world, rounds), timings.table("NTP", notes), "; ".join(speeds)]
    if official:
        tables.append(f"official / fused {timings.ratio(OFFICIAL, 'fused'):.1f}: median of the rounds")
    return "\n".join(tables)


def ratios(timings: Timings, kept: dict[str, int]) -> Ratios:
    """Seconds and saved bytes of each kind, divided by those of the NTP step, and of the official one by the fused."""
    pairs = [(kind, "NTP") for kind in timings.seconds if kind != "NTP"]
    pairs += [(OFFICIAL, "fused")] if OFFICIAL in timings.seconds else []
    return {
        "seconds": {f"{kind} / {base}": round(timings.ratio(kind, base), 4) for kind, base in pairs},
        "saved bytes": {f"{kind} / NTP": round(kept[kind] / kept["NTP"], 4) for kind in kept if kind != "NTP"},
    }


class Batches:
    """This rank's part of each batch, from the run's own data."""

    def __init__(self, config: Config, ranks: Any):
        import torch.distributed as dist

        from megatron_refine.data.prepare import prepare

        if ranks.is_main:
            prepare(config)
        dist.barrier()
        self.config, self.ranks, self.rows = config, ranks, prepare(config).train

    def __call__(self, i: int) -> Batch:
        from megatron_refine.data.order import rank_samples, sample_rows
        from megatron_refine.platform import hardware

        c, size = self.config, self.config.train.global_batch_size
        samples = rank_samples(i * size, size, c.mini_batch_size, self.ranks.dp_rank, self.ranks.dp)
        order = sample_rows(c.run.seed, i * size, size, len(self.rows))
        return self.rows.batch(order[samples - i * size], samples).to(hardware.device())


def steps(config: Config, ranks: Any, names: Sequence[str]) -> dict[str, Callable[[Batch, int], dict[str, float]]]:
    """What takes a step of each kind named: all on the same model and optimizer."""
    from megatron_refine.bench.official import OfficialStep
    from megatron_refine.engine.native import NativeEngine
    from megatron_refine.step.refine import RefineStep
    from megatron_refine.trainer.model import build_model
    from megatron_refine.trainer.optimizer import Updater

    model = build_model(config, ranks)
    updater = Updater(config, model, ranks)

    def kind(step: type[RefineStep], mode: str | None) -> Callable[[Batch, int], dict[str, float]]:
        update = config.update.model_copy(update={"mode": mode or "auto"})
        own = step(config.model_copy(update={"update": update}), model, NativeEngine(model), updater, ranks)
        return lambda batch, i: own(batch, i, refine=mode is not None)

    return {name: kind(OfficialStep, "auto") if name == OFFICIAL else kind(RefineStep, KINDS[name]) for name in names}


def shapes(c: Config, world: int, rounds: int) -> str:
    """What was measured, in a line."""
    p, r, m = c.parallel, c.refine, c.model
    return (
        f"{m.family} hidden {m.hidden_size}, {m.num_layers} layers, vocabulary {m.vocab_size}; batch "
        f"{c.train.global_batch_size} x {c.data.seq_length}; c {r.num_chunks} n {r.num_rollouts} k {r.rollout_len}; "
        f"{usage.ranks(world)}, tp {p.tp}{' sp' if p.sp else ''}; {c.train.precision}, recompute {c.train.recompute}; "
        f"medians of {rounds}"
    )


def _speed(config: Config, world: int, kind: str, seconds: float) -> str:
    from megatron_refine.estimate.flops import batch_flops
    from megatron_refine.platform import hardware

    tokens = config.train.global_batch_size * config.data.seq_length / seconds
    own = config.model_copy(update={"update": config.update.model_copy(update={"mode": KINDS[kind] or "auto"})})
    work, peak = batch_flops(own, kind != "NTP") / seconds / world, hardware.peak_flops()
    share = f"mfu {work / peak:.0%}" if peak else f"{work / 1e9:.1f} GFLOP/s a rank"
    return f"{kind} {tokens:.0f} tokens/s, {share}"


def _note(stages: dict[str, list[float]], kept: int | None, base: int) -> str:
    parts = [f"{name} {1e3 * statistics.median(found):.0f}" for name, found in stages.items()]
    saved = f"saved {kept / 2**20:.0f} MiB ({kept / base:.3f}); " if kept is not None else ""
    return f"{saved}ms: {', '.join(parts)}"
