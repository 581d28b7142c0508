"""Rollouts from states that are there anyway, and from prefixes that are prefilled first."""

from typing import Any

from megatron_refine.bench.step import Batches, shapes
from megatron_refine.bench.timing import Timings
from megatron_refine.config import Config


def run(config: Config, rounds: int) -> str:
    """`rounds` of each way to write the same rollouts, without scoring. Returns the first rank's table."""
    import torch
    import torch.distributed as dist

    from megatron_refine.bench.official import write
    from megatron_refine.engine.native import NativeEngine
    from megatron_refine.kernels.places import Places
    from megatron_refine.records import Fork, RolloutRequest
    from megatron_refine.trainer import forward
    from megatron_refine.trainer.model import build_model
    from megatron_refine.trainer.parallel import init_parallel

    ranks, r = init_parallel(config), config.refine
    model = build_model(config, ranks).eval()
    batch, engine = Batches(config, ranks)(0), NativeEngine(model)
    generator = torch.Generator().manual_seed(config.run.seed)
    positions = torch.randint(r.margin, config.data.seq_length - r.margin, (len(batch.tokens), r.num_chunks),
                              generator=generator).sort(1)[0].to(batch.tokens.device)  # fmt: skip
    sequences = torch.arange(len(positions), device=positions.device).repeat_interleave(r.num_chunks)
    starts = positions.flatten()
    rows, lengths = (x.repeat_interleave(r.num_rollouts) for x in (sequences, starts))
    draws = torch.rand(r.rollout_len, len(rows), generator=generator, dtype=torch.float64).to(positions.device)
    with torch.no_grad():
        hidden, handles = forward.prefill(model, batch.tokens)

    @torch.no_grad()
    def forked(_: int) -> Any:
        places = Places.read(sequences, starts)
        states = {layer: handle.at(places) for layer, handle in handles.items()}
        fork = Fork(states, hidden.take(starts - 1, sequences))
        return engine.rollout(RolloutRequest(
            batch.tokens, positions, batch.sample_ids, r.num_rollouts, r.rollout_len, r.rollout_temperature,
            config.run.seed, 0, fork,
        ))  # fmt: skip

    def padded(_: int) -> None:
        for i in range(len(rows)):
            write(model, batch.tokens[rows[i : i + 1]], lengths[i : i + 1], draws[:, i : i + 1], 1.0)

    def unpadded(_: int) -> None:
        for i in range(len(rows)):
            text = batch.tokens[rows[i : i + 1], : int(lengths[i]) + r.rollout_len]
            write(model, text, lengths[i : i + 1], draws[:, i : i + 1], 1.0)

    kinds = {"forked": forked, "prefilled": unpadded, "prefilled, padded": padded}
    timings = Timings(kinds, rounds, dist.barrier)
    return f"{shapes(config, ranks.world, rounds)}\n{timings.table('forked')}" if ranks.is_main else ""
