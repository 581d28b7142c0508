"""The benchmarks: what they compare gives the same result, and the command lines run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_refine.bench.baseline import Record
from megatron_refine.bench.hf import ntp_step
from megatron_refine.bench.timing import saved_bytes
from megatron_refine.config import Config, ConfigError, load
from megatron_refine.models.family import FAMILIES
from megatron_refine.platform import hardware
from tests import parity, runs
from tests.lanes import short
from tests.runs import End, _captured
from tests.test_step import make_step
from tests.zygote import Zygote

ROOT = Path(__file__).parents[1]


def gradients(config: Config, official: bool) -> Any:
    """On a rank, in fp64: every gradient of a step, by one scheme or the other."""
    from megatron_refine.bench.official import OfficialStep

    step = make_step(config, torch.float64)
    if official:
        step = OfficialStep(config, step.model, step.engine, step.updater, step.ranks)
    step(parity.batch(4), 0, refine=True)
    return parity.full_gradients(step.model)


@pytest.mark.parametrize(
    "model", short(["delta_net", "gated_delta_net", "lact", "lact muon"], lambda model: model == "delta_net")
)
def test_the_official_scheme_gives_the_gradient_of_the_fused_update(model: str, ranks: Zygote, tmp_path: Path) -> None:
    """Rows of full length and forked states: the same draws, rewards and loss. fp64: products in another order; Muon's
    steps amplify their rounding."""
    config = parity.small_config(tmp_path, "refine.rollout_temperature=0.7", model=model)
    fused, official = (ranks(1, gradients, config=config, official=official)[0] for official in (False, True))
    assert max(parity.relative(official, fused).values()) < (1e-7 if "muon" in model else 1e-10)


def written(config: Config) -> Any:
    """On a rank: rollouts of the native engine, and by prefilled rows with the same draws."""
    from megatron_refine.bench.official import OfficialStep

    step = make_step(config, torch.float64)
    official = OfficialStep(config, step.model, step.engine, step.updater, step.ranks)
    b = parity.batch(4)
    with torch.no_grad():
        native = step.explore(b, 3, keep_graph=False)[0]
        record = official._explore(b, 3)
    return native.experience, record


@pytest.mark.parametrize("model", short(["delta_net", "lact"], lambda model: model == "lact"))
def test_the_official_scheme_writes_the_same_rollouts(model: str, ranks: Zygote, tmp_path: Path) -> None:
    config = parity.small_config(tmp_path, "refine.rollout_temperature=0.7", model=model)
    native, official = ranks(1, written, config=config)[0]
    assert native.positions.equal(official.positions) and native.tokens.equal(official.tokens)
    for name in ("old_logprobs", "advantages"):
        torch.testing.assert_close(getattr(official, name), getattr(native, name), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("model", "message"), [("lact_bench", "lact is lact_llm.s; "), ("delta_net_tiny", "--hf: ")])
def test_flas_model_needs_what_this_machine_may_lack(model: str, message: str, tmp_path: Path) -> None:
    config = load([str(ROOT / "configs/bench.yaml")], [f"model={model}"], FAMILIES)
    if hardware.has_gpu() and model != "lact_bench":
        pytest.skip("there is a GPU: tools/bench.py step --hf runs it")
    with pytest.raises(ConfigError, match=message):
        ntp_step(config)


def test_saved_bytes_count_each_storage_once() -> None:
    x = torch.randn(1000, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(1000))
    assert saved_bytes(lambda: (x * x).exp()) == 8000  # x once, the result of exp
    assert saved_bytes(lambda: (x * weight).sum()) == 4000


def command(arguments: list[str]) -> End:
    """On a rank: the benchmark."""
    from megatron_refine.cli.bench import main

    with _captured() as texts:
        code = main(arguments)
    return End(code, *texts)


@pytest.mark.parametrize(
    "what, more, words",
    short(
        [
            ("step", ["--official"], ["official / fused", "two-pass", "saved", "NTP"]),
            ("step", ["model=lact_tiny", "data.seq_length=128", "--official"], ["official / fused", "lact hidden 128"]),
            ("length", ["--lengths", "192,128"], ["fused / NTP", "     128 ", "     192 "]),
            ("rollout", [], ["prefilled, padded", "forked"]),
            ("kernels", [], ["recurrence", "T 192"]),
            ("kernels", ["model=lact_tiny", "data.seq_length=64"], ["recurrence", "T 64"]),
            ("data", [], ["preparation", "M tokens/s"]),
            ("facts", [], ["TFLOP/s", "TB/s", "us (an operation"]),
        ],
        lambda what, more, words: what in ("step", "kernels", "facts") and not any("lact" in m for m in more),
    ),
)
def test_benchmarks_run(what: str, more: list[str], words: list[str], ranks: Zygote, tmp_path: Path) -> None:
    config = runs.write_config(tmp_path, tmp_path / "cache", train={"global_batch_size": 2, "micro_batch_size": 1})
    vocabulary = [] if not any("lact" in m for m in more) else ["model.vocab_size=512"]
    line = [what, "--config", str(config), "--rounds", "1", *more, *vocabulary, "refine.reward=cosine"]
    end = ranks(1, command, arguments=line)[0]
    assert end.code == 0, end.err
    assert all(word in end.out for word in words), end.out


def test_overlap_is_measured_between_replicas(ranks: Zygote, tmp_path: Path) -> None:
    config = runs.write_config(tmp_path, tmp_path / "cache", train={"global_batch_size": 2, "micro_batch_size": 1})
    line = ["overlap", "--config", str(config), "--rounds", "1", "train.bucket_millions=0.01"]
    first, other = ranks(2, command, arguments=line)
    assert first.code == other.code == 0, first.err
    assert "exposed communication: " in first.out and "beside" in first.out and not other.out
    alone = ranks(1, command, arguments=line)[0]
    assert alone.code == 2 and alone.err.startswith("overlap: needs several replicas"), alone.err


@pytest.mark.parametrize(
    "more, words",
    [
        (["--rounds", "0"], "--rounds=0: must be 1 or more"),
        (["--official", "update.mini_batch_size=2"], "--official: runs on one rank, with one optimizer step a batch"),
    ],
)
def test_what_cannot_be_measured(more: list[str], words: str, ranks: Zygote, tmp_path: Path) -> None:
    config = runs.write_config(tmp_path, tmp_path / "cache")
    end = ranks(1, command, arguments=["step", "--config", str(config), *more])[0]
    assert (end.code, end.out) == (2, "") and end.err.startswith(words) and end.err.count("\n") == 1


def test_ratios_are_written_and_compared(ranks: Zygote, tmp_path: Path) -> None:
    """A step that is said to cost a thousandth of an NTP step: code 1, a line for it, and today's ratios in a file."""
    config = runs.write_config(tmp_path, tmp_path / "cache", train={"global_batch_size": 2, "micro_batch_size": 1})
    kept, today = tmp_path / "kept.json", tmp_path / "today.json"
    record = Record("", load([str(config)], ["refine.reward=cosine"], FAMILIES), 1, out=kept)
    record.keep({"seconds": {"fused / NTP": 0.001}, "saved bytes": {}}, 1)
    line = ["step", "--config", str(config), "--rounds", "1", "refine.reward=cosine"]
    end = ranks(1, command, arguments=[*line, "--json", str(today), "--check", str(kept)])[0]
    assert end.code == 1 and "two-pass" in end.out, end.err
    assert end.err.startswith(f"{kept}: fused / NTP, seconds: ") and end.err.count("\n") == 1
    assert json.loads(today.read_text(encoding="utf-8"))["ratios"]["saved bytes"]["fused / NTP"] > 1
