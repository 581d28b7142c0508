"""The plan of a run on a machine, as text: memory, work, time, collectives, and the layouts it could have."""

from megatron_refine.config import Config
from megatron_refine.estimate.flops import step_flops, total_steps
from megatron_refine.estimate.hardware import Hardware
from megatron_refine.estimate.layouts import Layout, layout_of, layouts
from megatron_refine.estimate.memory import itemsize
from megatron_refine.estimate.table import render
from megatron_refine.estimate.timing import collective_seconds
from megatron_refine.estimate.total import estimate
from megatron_refine.estimate.traffic import step_traffic
from megatron_refine.models import cost

SHOWN = 8  # layouts


def plan(config: Config, world: int, hardware: Hardware) -> str:
    """Everything; with a note where the batch is planned larger, because it does not divide among the ranks.

    Raises ConfigError where the ranks do not fit the configuration's own layout.
    """
    config, note = dividing(config, world)
    own = layout_of(config, world, hardware)
    parts = [note, render(estimate(config, world)), _fit(own, hardware), *_server(config)]
    parts += [times(own, world, hardware), _collectives(own, hardware), _ranking(own, world, hardware)]
    return "\n\n".join(part for part in parts if part)


def dividing(config: Config, world: int) -> tuple[Config, str]:
    """Return the configuration with the next batch that divides among the ranks, and a line that says so; the same and
    "" where its own does."""
    train, update = config.train, config.update
    unit = max(1, world // config.parallel.model_size) * train.micro_batch_size
    mini = -(-config.mini_batch_size // unit) * unit
    if mini == config.mini_batch_size:
        return config, ""
    batch = -(-train.global_batch_size // mini) * mini
    changed: dict[str, object] = {"train": train.model_copy(update={"global_batch_size": batch})}
    if update.mini_batch_size:
        changed["update"] = update.model_copy(update={"mini_batch_size": mini})
    own = f"update.mini_batch_size={mini}, " if update.mini_batch_size else ""
    dp = unit // train.micro_batch_size
    line = (
        f"note: a mini-batch of {config.mini_batch_size} sequences does not divide among {dp} data parallel ranks; "
        f"planned with {own}train.global_batch_size={batch} (multiples of {unit} divide)"
    )
    return config.model_copy(update=changed), line


def times(layout: Layout, world: int, hardware: Hardware) -> str:
    """Seconds of a step by stage, throughput and the hours of the run."""
    config, time = layout.config, layout.time
    best, worst = time.total
    head = f"time of a step on {world} {hardware.name}, assumed"
    lines = [f"{head:<44}{'at best':>12}{'at worst':>12}"]
    lines += [f"  {name + ', s':<42}{a:>12.3g}{b:>12.3g}" for name, (a, b) in time.stages.items()]
    refine = config.refine.enabled
    lines += [f"  {'REFINE step, s' if refine else 'NTP step, s':<42}{best:>12.3g}{worst:>12.3g}"]
    if refine:
        lines += [f"  {'NTP step, s':<42}{time.ntp[0]:>12.3g}{time.ntp[1]:>12.3g}"]
        lines += [f"  {'REFINE / NTP':<42}{best / time.ntp[0]:>12.2f}{worst / time.ntp[1]:>12.2f}"]
    (fast, slow), (high, low) = throughput(layout, world, hardware)
    hours = [seconds * total_steps(config) * world / 3600 for seconds in (best, worst)]
    lines += [f"  {'tokens/s a GPU':<42}{fast:>12,.0f}{slow:>12,.0f}", f"  {'MFU':<42}{high:>12.0%}{low:>12.0%}"]
    name = f"GPU-hours of {total_steps(config)} steps"
    return "\n".join([*lines, f"  {name:<42}{hours[0]:>12,.3g}{hours[1]:>12,.3g}"])


def throughput(layout: Layout, world: int, hardware: Hardware) -> tuple[tuple[float, float], tuple[float, float]]:
    """Tokens/s of a GPU, and model FLOPs utilisation (arXiv 2204.02311): (at best, at worst) each."""
    config, work = layout.config, step_flops(layout.config)
    tokens = config.train.global_batch_size * config.data.seq_length
    flops = work.refine if config.refine.enabled else work.ntp
    best, worst = layout.time.total
    rates = tokens / best / world, tokens / worst / world
    peak = world * hardware.peak(config.train.precision)
    return rates, (flops / best / peak, flops / worst / peak)


def _fit(layout: Layout, hardware: Hardware) -> str:
    room, total = hardware.memory_bytes * hardware.usable, layout.memory.total
    verdict = "fits" if layout.fits(hardware) else "DOES NOT FIT"
    return f"{verdict}: {total / 2**30:.1f} of {room / 2**30:.1f} GiB ({hardware.usable:.0%} of an {hardware.name})"


def _server(config: Config) -> list[str]:
    if config.engine.kind != "sglang":
        return []
    model, tp = config.model, config.engine.tp
    weights = cost.parameters(model) * itemsize(config) / tp / 2**30
    state = cost.request_bytes(model, tp) / 2**30
    requests = config.engine.max_requests
    return [
        f"a GPU of an SGLang server, tp {tp}: weights {weights:.2f} GiB, states of {requests} requests "
        f"{requests * state:.2f} GiB"
    ]


def _collectives(layout: Layout, hardware: Hardware) -> str:
    config, time = layout.config, layout.time
    if not time.exchanged:
        return ""
    stage = config.parallel.pp - 1
    found = step_traffic(config, layout.dp, config.refine.enabled, stage)
    lines = [f"{'collectives of a rank, a step':<44}{'calls':>12}{'GiB':>12}{'s':>12}"]
    for axis, op in sorted({(x.axis, x.op) for x in found}):
        mine = [x for x in found if (x.axis, x.op) == (axis, op)]
        calls, size = sum(x.calls for x in mine), sum(x.size for x in mine) / 2**30
        seconds = sum(collective_seconds(config, layout.dp, hardware, x) for x in mine)
        lines.append(f"  {axis + ' ' + op:<42}{calls:>12,.0f}{size:>12.3f}{seconds:>12.3f}")
    return "\n".join(lines)


def _ranking(own: Layout, world: int, hardware: Hardware) -> str:
    found, refused = layouts(own.config, world, hardware)
    lines = [f"{'layouts that fit, the fastest first':<50}{'GiB':>12}{'s a step':>16}{'MFU':>12}"]
    shown = found[:SHOWN] + [x for x in found[SHOWN:] if x.name == own.name]
    for layout in shown:
        best, worst = layout.time.total
        high, low = throughput(layout, world, hardware)[1]
        mark = " <- this configuration" if layout.name == own.name else ""
        lines.append(
            f"  {layout.name:<48}{layout.memory.total / 2**30:>12.1f}{f'{best:.3g}-{worst:.3g}':>16}"
            f"{f'{low:.0%}-{high:.0%}':>12}{mark}"
        )
    if len(found) > len(shown):
        lines.append(f"  and {len(found) - len(shown)} more")
    if refused:
        reasons = "; ".join(f"{count}: {reason}" for reason, count in sorted(refused.items(), key=lambda x: -x[1]))
        lines.append(f"  left out: {reasons}")
    return "\n".join(lines)


def summary(config: Config, world: int, hardware: Hardware) -> str:
    """One line, for a dry run: seconds of a step and the hours of the run."""
    best, worst = layout_of(config, world, hardware).time.total
    hours = [seconds * total_steps(config) * world / 3600 for seconds in (best, worst)]
    return (
        f"on {world} {hardware.name}: {best:.3g} to {worst:.3g} s a step, {hours[0]:,.3g} to {hours[1]:,.3g} GPU-hours"
    )
