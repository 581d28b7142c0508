"""The collectives of a step on one rank: what calls them, over which ranks, how often and how many bytes.

Counted from the passes that a step makes (docs/estimator.md); held to the collectives of real ranks by tests. Sums of a
few scalars (losses, norms of gradients) are left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_refine.config import Config
from megatron_refine.estimate.memory import itemsize, muon_matrices, recomputed
from megatron_refine.models import cost

FP32, INT64, BOOL = 4, 8, 1


@dataclass(frozen=True)
class Traffic:
    stage: str  # score, rollout, rescore, update, or step: once an optimizer step
    axis: str  # tp, cp, pp, dp: the ranks that take part; dp includes cp, which shares out gradients too
    op: str  # all_reduce, all_gather, reduce_scatter, all_to_all, send, broadcast
    calls: float
    size: float  # bytes of all calls together: of the whole tensor that each is about


@dataclass(frozen=True)
class Pass:
    """Rows through this rank's layers."""

    stage: str
    times: int  # of it in a step
    rows: int  # a sequence, or branches
    batch: int  # sequences side by side
    scored: int  # rows with a target, of all sequences
    forward: bool = True
    backward: bool = False
    sp: bool = True  # where the layout has it

    def padded(self, config: Config) -> int:
        """Rows of a context parallel rank."""
        p = config.parallel
        unit = p.cp * (p.tp if p.sp and self.sp else 1)
        return -(-self.rows // unit) * unit // p.cp


def step_traffic(config: Config, dp: int, refine: bool, stage: int = 0) -> list[Traffic]:
    """Count the collectives of a batch, on a rank of pipeline stage `stage`."""
    found = [x for each in passes(config, dp, refine) for x in _of_pass(config, each, stage)]
    micros = config.train.global_batch_size // (dp * config.train.micro_batch_size)
    if refine:
        found += _shared_rows(config, micros)
    updates = config.train.global_batch_size // config.mini_batch_at(config.refine.start_step, refine)
    found += _of_update(config, dp, stage, updates)
    return [x for x in found if x.calls and getattr(config.parallel, x.axis, dp * config.parallel.cp) > 1]


def passes(config: Config, dp: int, refine: bool) -> list[Pass]:
    """All of a batch on one rank."""
    r, micro, length = config.refine, config.train.micro_batch_size, config.data.seq_length
    times, branch = config.train.global_batch_size // (dp * micro), config.branch_rows
    whole = Pass("update", times, length, micro, micro * length, backward=True)
    if not refine:
        return [whole]
    branches = micro * r.num_chunks * r.num_rollouts
    found = [
        Pass("score", times, length, micro, micro * length),
        Pass("rollout", times * (r.rollout_len - 1), branches, 1, 0, sp=False),
        Pass("rescore", times, branch, micro, micro * branch, sp=False),
    ]
    if config.fused:
        later = {"forward": False, "backward": True}
        return [*found, Pass("update", times, length, micro, micro * length, **later),
                Pass("update", times, branch, micro, micro * branch, **later, sp=False)]  # fmt: skip
    return [*found, Pass("update", times, length + branch, micro, micro * (length - 1 + branch), backward=True)]


def _of_pass(config: Config, each: Pass, stage: int) -> Iterator[Traffic]:
    p, model, size = config.parallel, config.model, itemsize(config)
    rows, own = each.padded(config) * each.batch, cost.stage_layers(model, p, stage)
    layers = len(own)
    first, last = stage == 0, stage == p.pp - 1
    hidden = rows * model.hidden_size * size
    again = layers * each.backward * len(recomputed(config))  # modules that run again
    inner = layers * each.backward * (config.train.recompute == "full")  # the first of a layer's, to its very end
    sharded = p.sp and each.sp

    def traffic(axis: str, op: str, calls: float, each_size: float) -> Traffic:
        return Traffic(each.stage, axis, op, each.times * calls, each.times * calls * each_size)

    ahead, back = layers * each.forward, layers * each.backward
    starts, ends = first * each.forward, last * each.forward
    if sharded:
        gathers = 2 * ahead + again + ends + 4 * back + first * each.backward
        yield traffic("tp", "all_gather", gathers, hidden)
        yield traffic("tp", "reduce_scatter", 2 * ahead + inner + starts + 2 * back + last * each.backward, hidden)
    else:
        yield traffic("tp", "all_reduce", 2 * ahead + inner + starts + 2 * back + last * each.backward, hidden)
    exchanges = each.forward + each.backward + each.backward * ("mixer" in recomputed(config))  # of a layer
    for layer, count in cost.grouped(own):
        columns = sum(layer.cost.exchanged_columns(p.tp * p.cp)) / 2
        yield traffic("cp", "all_to_all", 2 * exchanges * count, rows * columns // p.tp * size)
    if last:
        yield from _of_head(config, each, traffic)
    travelled = hidden // (p.tp if sharded else 1)
    groups = min(p.pp, config.refine.num_chunks * config.train.micro_batch_size) if each.stage == "rollout" else 1
    sends = groups * (not last) * each.forward + (not first) * each.backward
    yield traffic("pp", "send", sends, travelled / groups)
    if each.stage == "rollout" and last:
        yield traffic("pp", "send", groups, each.rows * INT64 / groups)  # the drawn tokens, to the first stage


def _of_head(config: Config, each: Pass, traffic: object) -> Iterator[Traffic]:
    """Four numbers a row and shard of the vocabulary; two gathers of draws."""
    assert callable(traffic)
    p, r = config.parallel, config.refine
    if each.scored and each.forward:
        rows = each.scored // p.cp
        yield traffic("tp", "all_gather", 1, 4 * p.tp * rows * FP32)
        yield traffic("cp", "all_reduce", 1, 3 * each.scored * FP32)
    if each.stage == "rollout":
        share = r.rollout_len / max(1, r.rollout_len - 1)  # the first token is drawn from a main row
        groups = min(p.pp, r.num_chunks * config.train.micro_batch_size)
        drawn = -(-each.rows // p.cp)
        for numbers in (3, 2):  # in fp64
            yield traffic("tp", "all_gather", share * groups, numbers * p.tp * drawn * 2 * FP32 / groups)
        yield traffic("cp", "all_reduce", share * groups, each.rows * INT64 / groups)
        yield traffic("cp", "all_reduce", share * groups, each.rows * FP32 / groups)


def _shared_rows(config: Config, micros: int) -> Iterator[Traffic]:
    """Rows and numbers that every rank of a replica gets of the pass before an update."""
    p, r, micro, length = config.parallel, config.refine, config.train.micro_batch_size, config.data.seq_length
    row, branch = config.model.hidden_size * itemsize(config), micro * config.branch_rows
    positions, truth = micro * r.num_chunks, micro * r.num_chunks * r.rollout_len
    groups = min(p.pp, positions)
    for stage, rows in (("score", positions), ("rescore", branch), ("rescore", truth)):
        yield Traffic(stage, "cp", "all_reduce", micros, micros * rows * row)
        yield Traffic(stage, "pp", "broadcast", micros, micros * rows * row)
    scores = 2 * FP32 + BOOL
    yield Traffic("score", "pp", "broadcast", 3 * micros, micros * micro * length * scores)
    yield Traffic("rollout", "pp", "broadcast", 2 * groups * micros, micros * branch * (INT64 + FP32))
    yield Traffic("rescore", "pp", "broadcast", 3 * micros, micros * branch * scores)


def _of_update(config: Config, dp: int, stage: int, updates: int) -> Iterator[Traffic]:
    """Once an optimizer step: gradients in fp32, the new weights, norms' gradients that tp ranks hold parts of."""
    p, model = config.parallel, config.model
    count, own = cost.rank_parameters(model, p, stage), cost.stage_layers(model, p, stage)
    if config.optimizer.distributed:
        yield Traffic("step", "dp", "reduce_scatter", updates, updates * count * FP32)
        yield Traffic("step", "dp", "all_gather", updates, updates * count * itemsize(config))
    else:  # and each matrix whole
        matrices, weights = muon_matrices(own)
        yield Traffic("step", "dp", "all_reduce", updates, updates * count * FP32)
        yield Traffic("step", "tp", "all_gather", updates * matrices, updates * weights * FP32)
    yield Traffic("step", "tp", "all_reduce", updates, updates * sum(layer.cost.partial(p.tp) for layer in own) * FP32)
    if p.sp:
        norms = (2 * len(own) + (stage == p.pp - 1)) * model.hidden_size
        yield Traffic("step", "tp", "all_reduce", updates, updates * norms * FP32)
