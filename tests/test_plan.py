"""The plan of a run: time, layouts, and the command line that prints it."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_refine.config import Config, check_world_size, load
from megatron_refine.estimate import estimate
from megatron_refine.estimate.flops import step_flops
from megatron_refine.estimate.hardware import Hardware
from megatron_refine.estimate.layouts import layout_of, layouts
from megatron_refine.estimate.plan import dividing, plan, summary, throughput, times
from megatron_refine.estimate.timing import HIDDEN, collective_seconds, step_time
from megatron_refine.estimate.traffic import Pass, Traffic, step_traffic
from megatron_refine.models.family import FAMILIES

ROOT = Path(__file__).parents[1]
LARGE = ROOT / "configs/midtrain_delta_net_7b.yaml"
# no latency, and whole peaks: what remains can be computed by hand
IDEAL = Hardware(slow=1, fast=1, node_latency=1e-15, network_latency=1e-15, launch=0, reached_bandwidth=1)


def large(*overrides: str) -> Config:
    return load([str(LARGE)], list(overrides), FAMILIES)


def test_alpha_and_beta_by_hand() -> None:
    """Four ranks of a node, and sixteen over two; a ring of w moves (w-1)/w of the tensor, an all-reduce twice that."""
    hardware = Hardware(reached_bandwidth=0.5, node_latency=1e-5, network_latency=1e-4)
    config = large("parallel.tp=4")

    def seconds(axis: str, op: str, dp: int = 4) -> float:
        return collective_seconds(config, dp, hardware, Traffic("update", axis, op, 10, 9e9))

    assert seconds("tp", "all_gather") == pytest.approx(10 * 3e-5 + 9e9 * 3 / 4 / 225e9)
    assert seconds("tp", "all_reduce") == pytest.approx(10 * 6e-5 + 2 * 9e9 * 3 / 4 / 225e9)
    assert seconds("dp", "reduce_scatter") == pytest.approx(10 * 3e-4 + 9e9 * 3 / 4 / 25e9)
    assert seconds("dp", "reduce_scatter", dp=2) == pytest.approx(10 * 1e-5 + 9e9 / 2 / 225e9)  # 4 x 2: one node
    assert seconds("pp", "send") == pytest.approx(10 * 1e-4 + 9e9 / 25e9)


def test_a_group_lies_where_its_ranks_do() -> None:
    """tp 2, cp 4, dp 2, pp 2: eight ranks of a node hold tp and cp; a gradient's group is dp and cp together."""
    hardware = Hardware(reached_bandwidth=1, node_latency=1e-9, network_latency=1e-9)
    config = large("parallel.tp=2", "parallel.cp=4", "parallel.pp=2", "train.micro_batch_size=1")

    def seconds(axis: str, op: str) -> float:
        return collective_seconds(config, 2, hardware, Traffic("update", axis, op, 1, 9e9))

    assert seconds("cp", "all_to_all") == pytest.approx(9e9 * 3 / 4 / 450e9, rel=1e-4)
    assert seconds("dp", "all_gather") == pytest.approx(9e9 * 7 / 8 / 50e9, rel=1e-4)
    assert seconds("pp", "broadcast") == pytest.approx(9e9 / 50e9, rel=1e-4)


def test_rows_that_no_layout_divides_are_counted_with_their_padding() -> None:
    """1001 rows over cp 2, and under sequence parallelism over tp 4 too."""
    config, rows = large("parallel.tp=4", "parallel.sp=true", "parallel.cp=2"), (1001, 1, 0)
    assert Pass("update", 1, *rows).padded(config) == 1008 // 2
    assert Pass("update", 1, *rows, sp=False).padded(config) == 1002 // 2


def test_servers_and_decoding_by_hand() -> None:
    """The weights go over the network once a step; a token of all branches reads this rank's weights once, or starts
    25 kernels a layer, whatever takes longer."""
    slow = Hardware(reached_bandwidth=0.5, launch=1e-3)
    parameters = estimate(large(), 64).parameters
    served = step_time(large("engine.kind=sglang", "engine.urls=['http://a:1']"), 16, slow)
    assert served.stages["sync"] == pytest.approx((parameters * 2 / 25e9, 3 * parameters * 2 / 25e9))
    assert "rollout" not in served.stages
    micros = 128 // 16
    for graphs, launch in (("false", 1e-3), ("true", 1e-4)):
        found = step_time(large(f"engine.cuda_graphs={graphs}"), 16, slow).stages["rollout"]
        starting = 25 * 32 * launch
        assert found[0] == pytest.approx(micros * 5 * starting / 2)
        assert found[1] - 2 * found[0] == pytest.approx(micros * 5 * parameters * 2 / 4 / 3.35e12, rel=0.01)


def test_what_fits_by_hand() -> None:
    layout = layout_of(large(), 64, Hardware())
    for share, fits in ((1.001, True), (0.999, False)):
        assert layout.fits(Hardware(memory_bytes=share * layout.memory.total / 0.9, usable=0.9)) == fits


def test_an_ideal_machine_takes_the_flops_over_its_peak() -> None:
    config = large("parallel.tp=1", "parallel.sp=false")
    time, work = step_time(config, 64, IDEAL), step_flops(config)
    each = 64 * IDEAL.peak_flops
    for stage in ("score", "rescore", "update"):
        assert time.stages[stage] == pytest.approx((getattr(work, stage) / each,) * 2), stage
    recomputed = step_time(large("parallel.tp=1", "parallel.sp=false", "train.recompute=full"), 64, IDEAL)
    assert recomputed.stages["update"][0] == pytest.approx(4 / 3 * time.stages["update"][0])


def test_a_pipeline_waits_at_both_ends() -> None:
    """8 micro-batches an optimizer step on 4 stages: 11 turns for 8. Scoring: waves of 4, 7 turns for 4."""
    config = large("parallel.tp=1", "parallel.sp=false", "parallel.pp=4", "update.mini_batch_size=32")
    time, plain = step_time(config, 4, IDEAL), step_time(large("parallel.tp=1", "parallel.sp=false"), 16, IDEAL)
    head = time.stages["rescore"][0] / plain.stages["rescore"][0] / (7 / 4)  # the last stage has more than a quarter
    assert 1 < head < 1.1
    assert time.stages["update"][0] / plain.stages["update"][0] == pytest.approx(head * 11 / 8)
    assert time.stages["score"][0] / plain.stages["score"][0] == pytest.approx(head * 7 / 4)


def test_what_passes_hide_by_hand() -> None:
    """A reduction takes no time but for its last bucket, a gathering but for its first, where passes are as long."""
    long, short = Hardware(network_bandwidth=5e9), Hardware(network_bandwidth=1e15, network_latency=1e-9)
    count, updates = estimate(large(), 64).parameters / 4, 4  # tp 4

    def hidden(hardware: Hardware, *overrides: str) -> tuple[float, float]:
        time = step_time(large(*overrides), 16, hardware)
        return tuple(-x for x in time.stages.get(HIDDEN, (0.0, 0.0)))  # type: ignore[return-value]

    def whole(op: str, hardware: Hardware, *overrides: str) -> float:
        return step_time(large(*overrides), 16, hardware).exchanged["dp", op]

    share = 1 - 1 / -(-count // 40e6)
    both = share * (whole("reduce_scatter", short) + whole("all_gather", short))
    assert hidden(short) == pytest.approx((both, both), rel=1e-3) and both > 0
    work = step_flops(large()).ntp / 3 / 8 / 64 / 989e12  # of 128 sequences a rank has 8
    assert hidden(long) == pytest.approx((3 * updates * work / 0.55, 3 * updates * work / 0.30))
    assert hidden(short, "train.overlap=false") == hidden(short, "train.bucket_millions=1e5") == (0, 0)
    served = "engine.kind=sglang", "engine.urls=['http://a:1']"  # they are sent whole weights once a batch
    fewer = share * (whole("reduce_scatter", short) + 3 / 4 * whole("all_gather", short))
    assert hidden(short, *served) == pytest.approx((fewer, fewer), rel=1e-3)


def test_layouts_fit_and_are_ranked() -> None:
    config, hardware = large(), Hardware()
    found, refused = layouts(config, 64, hardware)
    slowest = [layout.time.total[1] for layout in found]
    assert slowest == sorted(slowest) and all(layout.fits(hardware) for layout in found)
    assert any(layout.name == layout_of(config, 64, hardware).name for layout in found)
    assert len({layout.name for layout in found}) == len(found)
    assert max(layout.config.parallel.tp for layout in found) == 8  # a whole node
    of_four = layouts(config, 64, Hardware(gpus_per_node=4))[0]
    assert max(layout.config.parallel.tp for layout in of_four) == 4
    small = layouts(config, 64, Hardware(memory_bytes=24e9))
    assert 0 < len(small[0]) < len(found)
    assert small[1]["more than 90% of a GPU's memory"] > refused.get("more than 90% of a GPU's memory", 0)


def test_throughput_is_tokens_over_seconds() -> None:
    """By hand: 128 sequences of 16384 tokens; MFU by the FLOPs of the step that it is, over the peak of all GPUs."""
    for overrides, kind in (([], "refine"), (["refine.enabled=false"], "ntp"), (["train.precision=fp32"], "refine")):
        config = large(*overrides)
        layout = layout_of(config, 64, Hardware())
        rates, shares = throughput(layout, 64, Hardware())
        peak = 64 * (67e12 if overrides == ["train.precision=fp32"] else 989e12)
        flops = getattr(step_flops(config), kind)
        for i, seconds in enumerate(layout.time.total):
            assert rates[i] == pytest.approx(128 * 16384 / seconds / 64)
            assert shares[i] == pytest.approx(flops / seconds / peak)
        assert layout.time.total[0] < layout.time.total[1]
    work = step_flops(large())
    assert work.refine == work.score + work.rollout + work.rescore + work.update > 1.01 * work.ntp


def test_times_are_numbers_of_the_layout() -> None:
    """Every number that the plan shows: seconds a stage, their sum, the ratio, and GPU-hours of all GPUs."""
    layout = layout_of(large("refine.start_step=7"), 64, Hardware())
    time, lines = layout.time, times(layout, 64, Hardware()).splitlines()
    shown = {line[:42].strip(): tuple(map(number, line[42:].split())) for line in lines[1:]}
    near = {"rel": 6e-3}  # three digits
    for name, seconds in time.stages.items():
        assert shown[f"{name}, s"] == pytest.approx(seconds, **near), name
    total = [sum(stage[i] for stage in time.stages.values()) for i in (0, 1)]
    assert shown["REFINE step, s"] == pytest.approx(tuple(total), **near) and shown["NTP step, s"] == pytest.approx(
        time.ntp, **near
    )
    assert shown["REFINE / NTP"] == pytest.approx([total[i] / time.ntp[i] for i in (0, 1)], abs=6e-3)
    hours = [100 * seconds * 64 / 3600 for seconds in total]  # 100 steps on 64 GPUs
    assert shown["GPU-hours of 100 steps"] == pytest.approx(hours, **near)
    assert f"{hours[0]:,.3g} to {hours[1]:,.3g} GPU-hours" in summary(layout.config, 64, Hardware())
    rates, shares = throughput(layout, 64, Hardware())
    assert shown["tokens/s a GPU"] == pytest.approx(rates, abs=0.6)
    assert shown["MFU"] == pytest.approx([100 * share for share in shares], abs=0.6)


def number(word: str) -> float:
    return float(word.rstrip("%").replace(",", ""))


def test_the_plan_names_everything() -> None:
    text = plan(large("engine.kind=sglang", "engine.urls=['http://a:1']", "engine.tp=8"), 64, Hardware())
    for words in ("6.7442 B parameters", "fits: ", "score, s", "update, s", "sync, s", "REFINE / NTP", "tokens/s a GPU",
                  "GPU-hours of 100 steps", "tp reduce_scatter", "dp all_gather", "<- this configuration", "left out: ",
                  "a GPU of an SGLang server, tp 8: weights 1.57 GiB"):  # fmt: skip
        assert words in text, words
    layout = layout_of(large(), 64, Hardware())
    (part,) = (part for part in plan(large(), 64, Hardware()).split("\n\n") if part.startswith("collectives of a rank"))
    rows = {line[:42].strip(): tuple(map(number, line[42:].split())) for line in part.splitlines()[1:]}
    found = step_traffic(large(), layout.dp, True)
    assert rows.keys() == {f"{x.axis} {x.op}" for x in found} and sum(row[2] for row in rows.values()) == pytest.approx(
        layout.time.stages["collectives"][0], abs=5e-3
    )
    for (axis, op), (calls, size, _) in ((name.split(), row) for name, row in rows.items()):
        mine = [x for x in found if (x.axis, x.op) == (axis, op)]
        assert calls == sum(x.calls for x in mine) and size == pytest.approx(
            sum(x.size for x in mine) / 2**30, abs=6e-4
        )
    assert "DOES NOT FIT" in plan(large("parallel.tp=1", "parallel.sp=false"), 32, Hardware())
    assert "GPU-hours" in summary(large(), 64, Hardware())


def run(*arguments: str) -> tuple[int, str, str]:
    command = [sys.executable, str(ROOT / "tools/estimate.py"), *arguments]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, cwd=ROOT)
    return done.returncode, done.stdout, done.stderr


def test_the_command_line(tmp_path: Path) -> None:
    slow = tmp_path / "slow.yaml"
    slow.write_text("name: A100\npeak_flops: 312.0e12\n", encoding="utf-8")
    code, out, err = run(str(LARGE), "--gpus", "64", "--hardware", str(slow), "parallel.tp=8")
    assert code == 0 and "on 64 A100" in out and "tp 8 (sequence parallel)" in out, err
    slow.write_text("peak_flop: 1.0\n", encoding="utf-8")
    for arguments, says in (
        (("--gpus", "6"), "world size 6 is no multiple of tp*cp*pp = 4*1*1 = 4"),
        (("--hardware", str(slow)), "did you mean peak_flops?"),
        (("parallel.pp=3",), "parallel.pp=3: must divide model.num_layers=32"),
    ):
        code, out, err = run(str(LARGE), *arguments)
        assert code == 2 and not out and says in err and len(err.splitlines()) == 1, err


NO_PRESETS = ("bench", "official")
PRESETS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml") if path.stem not in NO_PRESETS)


def test_a_plan_is_never_refused_for_what_it_does_not_need() -> None:
    """Data, tokenizer, prompts, a batch that divides: for every preset, on four numbers of GPUs in turn."""
    assert len(PRESETS) >= 9
    for i, name in enumerate(PRESETS):
        config = load([str(ROOT / "configs" / name)], [], FAMILIES)
        for world in (8, (64, 256, 1024)[i % 3]):
            text, dp = plan(config, world, Hardware()), world // config.parallel.model_size
            unit = dp * config.train.micro_batch_size
            assert text.startswith("note: a mini-batch of ") == (config.mini_batch_size % unit != 0), (name, world)
            assert "layouts that fit" in text, (name, world)
            fitted, note = dividing(config, world)
            assert check_world_size(fitted, world) == dp and dividing(fitted, world) == (fitted, "")
            assert not note or f"(multiples of {unit} divide)" in note


def test_a_plan_keeps_the_number_of_mini_batches_whole() -> None:
    config, note = dividing(large("train.global_batch_size=96", "update.mini_batch_size=48"), 256)
    assert (config.train.global_batch_size, config.update.mini_batch_size) == (128, 64)
    assert "planned with update.mini_batch_size=64, train.global_batch_size=128" in note


def test_it_imports_neither_torch_nor_megatron() -> None:
    code = "import sys, megatron_refine.estimate.plan; sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
