"""The estimate as text, for `--dry-run`."""

from megatron_refine.estimate.memory import recomputed
from megatron_refine.estimate.total import Estimate
from megatron_refine.models import cost

_BYTES = ((2**30, "GiB"), (2**20, "MiB"))
_FLOPS = ((10**15, "PFLOP"), (10**12, "TFLOP"), (10**9, "GFLOP"))
_COUNT = ((10**9, " B"), (10**6, " M"), (10**3, " k"), (1, ""))


def render(estimate: Estimate) -> str:
    """A table: the layout, the memory of a rank by component, the FLOPs of a step by stage."""
    return "\n".join([_layout(estimate), "", *_memory(estimate), "", *_work(estimate)])


def _layout(e: Estimate) -> str:
    p = e.config.parallel
    ranks = f"{e.world_size} rank" + "s" * (e.world_size > 1)
    sp = " (sequence parallel)" if p.sp else ""
    model = f"{e.config.model.family}, {_amount(e.parameters)} parameters"
    cp = f", cp {p.cp}" if p.cp > 1 else ""
    return f"{model}, on {ranks}: tp {p.tp}{sp}{cp}, pp {p.pp}, dp {e.dp}"


def _memory(e: Estimate) -> list[str]:
    c, m = e.config, e.memory
    share = f", 1/{e.dp * c.parallel.cp}" if c.optimizer.distributed else ""
    moments = f"{c.optimizer.kind.title()}'s moments" + (", fp32 weights" if c.train.precision == "bf16" else "")
    tokens = f"{c.train.micro_batch_size} x {c.data.seq_length} tokens"
    branches = f" + {c.train.micro_batch_size} x {c.branch_rows}" if c.refine.enabled else ""
    recompute = {"none": "", "selective": f", {' and '.join(recomputed(c))} recomputed", "full": ", recomputed"}
    rows = [
        (f"weights, {c.train.precision}", m.weights),
        ("gradients, fp32", m.gradients),
        (moments + share, m.optimizer),
        (f"activations, {tokens}{branches}{recompute[c.train.recompute]}", m.activations),
        ("logits and their gradient", m.head),
        ("forked states", m.states),
        ("total", m.total),
    ]
    head = "memory of a rank" + (f" (pipeline stage {m.stage})" if c.parallel.pp > 1 else "")
    scale, unit = _unit(m.total, _BYTES)
    return [f"{head:<60}{unit:>10}"] + [f"  {name:<58}{size / scale:>10.2f}" for name, size in rows]


def _work(e: Estimate) -> list[str]:
    c, f = e.config, e.flops
    head = 3 * c.train.global_batch_size * c.data.seq_length * cost.head_flops(c.model)
    rows = [("NTP step", f.ntp), (f"  of it the output layer, {c.model.vocab_size:,} tokens", head)]
    if c.refine.enabled:
        mode = "fused" if c.fused else "two-pass"
        rows += [("score", f.score), ("rollout", f.rollout), ("rescore", f.rescore), ("update", f.update)]
        rows += [(f"REFINE step, {mode}", f.refine)]
    title = f"work of a step, {c.train.global_batch_size} x {c.data.seq_length} tokens"
    scale, unit = _unit(f.ntp, _FLOPS)
    lines = [f"{title:<50}{unit:>10}{'of NTP':>10}"]
    return lines + [f"  {name:<48}{flops / scale:>10.2f}{flops / f.ntp:>10.3f}" for name, flops in rows]


def _amount(count: int) -> str:
    scale, unit = _unit(count, _COUNT)
    return f"{count / scale:.5g}{unit}"


def _unit(value: int, units: tuple[tuple[int, str], ...]) -> tuple[int, str]:
    """The largest unit that `value` reaches; the smallest when it reaches none."""
    return next((unit for unit in units if value >= unit[0]), units[-1])
