"""The time of a counted step at stated peaks, as tables and as JSON.

Two bounds: the roofline, which takes all matrix products at the peak of their dtype and all other bytes at that of the
memory; and a stricter one kernel by kernel, in which a kernel made of products takes its bytes where they last longer.
"""

import json
from collections import defaultdict
from collections.abc import Mapping

from megatron_refine.bench.launches.counter import BANDWIDTH, LAUNCH, PEAK_FLOPS, Sum
from megatron_refine.bench.launches.steps import OTHER, Counted
from megatron_refine.config import Config

DATA_SHEET = 989e12  # dense bf16 FLOP/s of an H100 or H200: what MFU is a share of
PLACES, WIDTH = 10, 44
TITLES = {"ntp": "NTP", "fused": "fused", "two_pass": "two-pass", "update": "update"}


def seconds(total: Sum) -> float:
    """Return the time of kernels one after the other at the peaks, or of launching them, whichever is more."""
    return max(total.seconds, total.launches * LAUNCH)


def summary(config: Config, counted: Mapping[str, Counted]) -> dict[str, dict[str, float]]:
    """Return of each kind of step its launches, the bytes of everything but matrix products, both bounds in seconds
    and, but for an update, as a share of the card's FLOP/s (mfu), and the reads of values by the host."""
    from megatron_refine.estimate.flops import batch_flops

    found: dict[str, dict[str, float]] = {}
    for kind, each in counted.items():
        if kind in OTHER.values():
            continue
        total, size, time = each.total(), 0.0, 0.0
        for (_, _, dtype, products), part in each.sums.items():
            time += part.flops / PEAK_FLOPS[dtype] if products else part.size / BANDWIDTH
            size += 0.0 if products else part.size
        bounds = {"roofline": max(time, total.launches * LAUNCH), "kernels": seconds(total)}
        found[kind] = {"launches": round(total.launches), "bytes": round(size), "host_reads": len(each.reads)}
        found[kind] |= {f"{name}_seconds": round(bound, 6) for name, bound in bounds.items()}
        if kind != "update":
            work = batch_flops(micro_batch(config, kind), kind != "ntp") / DATA_SHEET
            shares = zip(("mfu", "kernels_mfu"), bounds.values(), strict=True)
            found[kind] |= {name: round(work / bound, 4) for name, bound in shares}
    return found


def micro_batch(config: Config, kind: str) -> Config:
    """The configuration of what is counted: one micro-batch, by this kind of step."""
    train = config.train.model_copy(update={"global_batch_size": config.train.micro_batch_size})
    mode = {"ntp": "auto"}.get(kind, kind)
    update = config.update.model_copy(update={"mode": mode, "mini_batch_size": 0})
    return config.model_copy(update={"train": train, "update": update})


def as_json(config: Config, counted: Mapping[str, Counted]) -> str:
    return json.dumps(summary(config, counted), indent=2)


def tables(config: Config, counted: Mapping[str, Counted]) -> str:
    """All that was counted, for reading."""
    found = summary(config, counted)
    base = found.get("ntp")
    heads = "".join(f"{head:>{width}}" for head, width in zip(("ms", "/ NTP", "MFU"), (9, 8, 8), strict=True))
    lines = [title(config), "", f"{'':<29}{'roofline':>25}{'kernel by kernel':>25}"]
    lines.append(f"{'':<10}{'launches':>10}{'GB':>9}{heads}{heads}   TFLOP of products")
    for kind, each in found.items():
        cells = f"{TITLES[kind]:<10}{each['launches']:>10,}{each['bytes'] / 1e9:>9.1f}"
        for time, share in (("roofline_seconds", "mfu"), ("kernels_seconds", "kernels_mfu")):
            ratio = f"{each[time] / base[time]:.3f}" if base else ""
            cells += f"{1e3 * each[time]:>9.1f}{ratio:>8}{format(each[share], '.1%') if share in each else '':>8}"
        lines.append(f"{cells}   {products(counted[kind])}".rstrip())
    lines += ["", rollouts(counted)]
    for kind in found:
        own = counted[kind]
        lines += ["", *stages(TITLES[kind], own), "", *largest(own), "", reads(own)]
    return "\n".join(lines)


def rollouts(counted: Mapping[str, Counted]) -> str:
    """The launches of rollouts, as they are decoded and the other way."""
    other = next(name for name in counted if name in OTHER.values())
    own = next(name for name in OTHER.values() if name != other)
    parts = ((own, counted["fused"]), (other, counted[other]))
    return "rollouts: " + ", ".join(f"{each.total(['rollout']).launches:,.0f} launches {name}" for name, each in parts)


def title(config: Config) -> str:
    """What was counted, and at which peaks."""
    m, r = config.model, config.refine
    peaks = ", ".join(f"{flops / 1e12:.0f} TFLOP/s {str(dtype)[6:]}" for dtype, flops in PEAK_FLOPS.items())
    return (
        f"{m.family} hidden {m.hidden_size}, {m.num_layers} layers; {config.train.micro_batch_size} x "
        f"{config.data.seq_length} tokens, {config.train.precision}, recompute {config.train.recompute}; c "
        f"{r.num_chunks} n {r.num_rollouts} k {r.rollout_len}; counted, not measured\n"
        f"peaks: {peaks}; {BANDWIDTH / 1e12:.0f} TB/s; {1e6 * LAUNCH:.0f} us a launch; MFU of "
        f"{DATA_SHEET / 1e12:.0f} TFLOP/s. GB: of everything but kernels made of matrix products"
    )


def products(counted: Counted) -> str:
    """TFLOP of matrix products by dtype."""
    found: dict[str, float] = defaultdict(float)
    for (_, _, dtype, _), each in counted.sums.items():
        if each.flops:
            found[str(dtype)[6:]] += each.flops
    return ", ".join(f"{dtype} {flops / 1e12:.2f}" for dtype, flops in sorted(found.items()))


def stages(kind: str, counted: Counted) -> list[str]:
    """A line a stage, with the GB of products beside those of the rest."""
    lines = [f"{kind + ', by stage':<{WIDTH}}{'launches':>10}{'TFLOP':>9}{'GB':>9}{'GB prod.':>10}{'ms':>9}"]
    for stage in dict.fromkeys(key[0] for key in counted.sums):
        parts = {False: Sum(), True: Sum()}
        for key, each in counted.sums.items():
            if key[0] == stage:
                parts[key[3]].add(each)
        total = Sum()
        total.add(parts[False])
        total.add(parts[True])
        lines.append(
            f"{stage:<{WIDTH}}{total.launches:>10,.0f}{total.flops / 1e12:>9.2f}{parts[False].size / 1e9:>9.1f}"
            f"{parts[True].size / 1e9:>10.1f}{1e3 * total.seconds:>9.1f}"
        )
    return lines


def largest(counted: Counted) -> list[str]:
    """The ten operators that take longest."""
    found: dict[tuple[str, str], Sum] = defaultdict(Sum)
    for (_, name, dtype, _), each in counted.sums.items():
        found[name, str(dtype)[6:]].add(each)
    order = sorted(found.items(), key=lambda item: (-seconds(item[1]), item[0]))[:PLACES]
    lines = [f"{'the ten largest':<{WIDTH}}{'launches':>10}{'TFLOP':>9}{'GB':>9}{'':>10}{'ms':>9}"]
    for (name, kind), each in order:
        lines.append(
            f"{name[: WIDTH - 10]:<{WIDTH - 9}}{kind:<9}{each.launches:>10,.0f}{each.flops / 1e12:>9.2f}"
            f"{each.size / 1e9:>9.1f}{'':>10}{1e3 * each.seconds:>9.1f}"
        )
    return lines


def reads(counted: Counted) -> str:
    """Where the host waits for values, of two layers."""
    places = ", ".join(f"{stage} {place}" for stage, place in counted.reads)
    return f"reads from device to host: {len(counted.reads)}" + (f" ({places})" if places else "")
