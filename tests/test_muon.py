"""Muon: refused in one line where it cannot run; else which tensors it updates and how, and a resumed run."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_refine.config import Config
from megatron_refine.estimate.memory import rank_memory
from megatron_refine.platform.megatron.version import since
from tests import runs
from tests.parity import build, full_parameters, relative, small_config
from tests.test_calibration import check_collectives, held
from tests.test_checkpoint import part, start
from tests.test_updates import LAYOUTS

ROOT = Path(__file__).parents[1]
MISSING = not since(0, 19) or importlib.util.find_spec("emerging_optimizers") is None
REASON = "needs Megatron-Core 0.19 and emerging_optimizers, of NVIDIA's repository NVIDIA-NeMo/Emerging-Optimizers"
needed = pytest.mark.skipif(MISSING, reason=REASON)
OTHERS = {name: LAYOUTS[name] for name in ("tp2 sp", "cp2", "pp2", "dp2 overlap")}
MUON = ("optimizer.kind=muon", "optimizer.weight_decay=0", "optimizer.eps=1e-2", "train.micro_batch_size=1")
# a matrix in one of ours -> its parts, of each head or of all, as Hugging Face's format has them
PARTS = {"in_proj.weight": (4, (16, 16, 16, 1)), "linear_fc1.weight": (1, (96, 96)), "out_proj.weight": (1, (64,)),
         "linear_fc2.weight": (1, (64,))}  # fmt: skip


@pytest.mark.skipif(not MISSING, reason="nothing is missing")
def test_muon_is_refused_before_anything_starts(tmp_path: Path) -> None:
    config = runs.write_config(tmp_path, tmp_path / "cache", optimizer={"kind": "muon"})
    line = [sys.executable, "-m", "megatron_refine", "train", "--config", str(config), "--ranks", "2"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, encoding="utf-8")
    what = (
        r"NVIDIA's package emerging_optimizers: install it" if since(0, 19) else r"Megatron-Core 0\.19, not 0\.\d+\.\d+"
    )
    assert done.returncode == 2 and re.fullmatch(
        rf"optimizer\.kind=muon: needs {what}.*, or choose adam\n", done.stderr
    )
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]


def marks(config: Config) -> tuple[dict[str, list[int]], list[str]]:
    """On a rank: which weights are several matrices, with their rows a head, and what is Adam's for being no weight."""
    from megatron_refine.trainer.model import global_parameters
    from megatron_refine.trainer.muon import mark

    model, _ = build(config, torch.float32)
    mark(model, config)
    found = dict(global_parameters(model))
    fused = {name: p.qkv_split_shapes for name, p in found.items() if hasattr(p, "qkv_split_shapes")}
    assert all(found[name].shape[0] % sum(rows) == 0 for name, rows in fused.items())
    kept = [n for n, p in found.items() if p.dim() == 2 and getattr(p, "is_embedding_or_output_parameter", False)]
    return fused, kept


@pytest.mark.parametrize(
    ("model", "rows"),
    [
        ("delta_net", [16, 16, 16, 1]),
        ("gated_delta_net variant", [16, 16, 32, 32, 2, 2]),
        ("lact", [16] * 3 + [3, 1, 1]),
    ],
)
def test_fused_weights_are_several_matrices(ranks: Any, tmp_path: Path, model: str, rows: list[int]) -> None:
    """And scales of channels are none, though they have two dimensions."""
    layer, own = (
        "decoder.layers.{}.",
        ["self_attention.qk_scale", "self_attention.qk_offset"] if model == "lact" else [],
    )
    ends = ["embedding.word_embeddings.weight", "output_layer.weight"]
    for fused, kept in ranks(2, marks, config=small_config(tmp_path, "parallel.tp=2", model=model)):
        assert sorted(kept) == sorted(ends + [layer.format(i) + name for i in (0, 1) for name in own])
        for i in (0, 1):
            assert fused.pop(layer.format(i) + "self_attention.in_proj.weight") == rows
            assert fused.pop(layer.format(i) + "mlp.linear_fc1.weight") == [48, 48]
        assert not fused


def one_step(config: Config) -> tuple[float, dict[str, Tensor]]:
    """On a rank: the gradient's norm and by how much each parameter has moved."""
    step, _ = start(config)
    before = full_parameters(step.model)
    norm = step(part(0, step), 0, refine=True)["train/grad_norm"]
    return norm, {name: p - before[name] for name, p in full_parameters(step.model).items()}


def matrices(moved: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the tensors that are Muon's, each matrix by itself."""
    found = {}
    for name, whole in moved.items():
        for end, (heads, rows) in PARTS.items():
            if name.endswith(end):
                cut = whole.unflatten(0, (heads, -1)).split(rows, 1)
                found |= {f"{name} {i}": x.flatten(0, 1) for i, x in enumerate(cut)}
    return found


@needed
def test_an_update_is_orthogonal_and_the_same_at_every_layout(ranks: Any, tmp_path: Path) -> None:
    """Muon's of each matrix: its singular values are about one. What is Adam's moves as in a run with Adam alone."""
    norm, reference = ranks(1, one_step, config=small_config(tmp_path, *MUON))[0]
    same, adam = ranks(1, one_step, config=small_config(tmp_path, *MUON, "optimizer.kind=adam"))[0]
    assert norm == pytest.approx(same, rel=1e-6)
    found = matrices(reference)
    assert len(found) == 2 * 8
    for name, update in found.items():
        values = torch.linalg.svdvals(update / (1e-2 * 0.2 * max(update.shape) ** 0.5))
        assert 0.6 < float(values.median()) < 1.4 and float(values.max()) < 1.4, (name, values)
    for name, error in relative(reference, adam).items():
        assert error > 0.1 if name.endswith(tuple(PARTS)) else error < 1e-5, (name, error)
    for world, overrides in OTHERS.values():
        for other, moved in ranks(world, one_step, config=small_config(tmp_path, *MUON, *overrides)):
            assert other == pytest.approx(norm, rel=2e-5)
            worst = max(relative(moved, reference).items(), key=lambda item: item[1])
            assert worst[1] < 1e-4, (overrides, worst)


def trained(config: Config, steps: range, source: Path | None = None) -> Any:
    """On a rank: metrics of these steps, of a new run or of one that goes on; every parameter; the checkpoint."""
    from megatron_refine.checkpoint.checkpoints import Progress

    step, checkpoints = start(config)
    if source:
        assert checkpoints.load(source, step.updater).step == steps.start
    found = [step(part(i, step), i, refine=True) for i in steps]
    folder = checkpoints.save(Progress(steps.stop, 4 * steps.stop, "rows"), step.updater)
    found = [{key: value for key, value in row.items() if key.startswith("train/")} for row in found]
    return found, full_parameters(step.model), folder


@needed
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_is_the_uninterrupted_one(ranks: Any, tmp_path: Path, precision: str) -> None:
    """Bit by bit on two data-parallel ranks, from before the first step too; at other layouts but for rounding."""
    config = small_config(tmp_path, *MUON, f"train.precision={precision}")
    whole, weights, _ = ranks(2, trained, config=config, steps=range(4))[0]
    done: list[Any] = []
    folder = None
    for steps in (range(0), range(2), range(2, 4)):
        found, again, folder = ranks(2, trained, config=config, steps=steps, source=folder)[0]
        done += found
        if steps.stop == 2:
            halfway = folder
    assert done == whole
    assert [name for name in weights if not weights[name].equal(again[name])] == []
    for world, overrides in OTHERS.values() if precision == "fp32" else ():
        config = small_config(tmp_path, *MUON, *overrides)
        _, again, _ = ranks(world, trained, config=config, steps=range(2, 4), source=halfway)[0]
        assert max(relative(again, weights).values()) < 1e-6, overrides


def restarted(config: Config) -> list[Any]:
    """On a rank: an NTP step of a new run, and again after a restart: metrics and parameters."""
    step, _ = start(config)
    weights, found = step.updater.weights(), []
    for _ in range(2):
        metrics = step(part(0, step), 0, refine=False)
        found.append((metrics["train/loss"], metrics["train/grad_norm"], full_parameters(step.model)))
        step.updater.restart(weights)
    return found


@needed
def test_a_restart_forgets_the_momentum(ranks: Any, tmp_path: Path) -> None:
    (*first, moved), (*second, again) = ranks(1, restarted, config=small_config(tmp_path, *MUON))[0]
    assert first == second and all(moved[name].equal(again[name]) for name in moved)


@needed
@pytest.mark.parametrize("overrides", [("train.precision=bf16",), ("parallel.tp=2",), ("parallel.pp=2",)])
@pytest.mark.parametrize("model", ["delta_net", "lact"])
def test_the_estimate_is_what_a_rank_holds(ranks: Any, tmp_path: Path, model: str, overrides: tuple[str, ...]) -> None:
    """To the byte, on each rank."""
    config = small_config(tmp_path, *MUON, *overrides, model=model)
    for rank, (_, state) in enumerate(ranks(2, held, config=config)):
        stage = rank if config.parallel.pp > 1 else 0
        assert state == rank_memory(config, 2 // config.parallel.model_size, stage).optimizer


@needed
@pytest.mark.parametrize("overrides", [["parallel.tp=2", "parallel.sp=true"], []], ids=["tp2 sp", "dp2"])
def test_the_estimate_knows_what_ranks_exchange(ranks: Any, tmp_path: Path, overrides: list[str]) -> None:
    check_collectives(ranks, 2, small_config(tmp_path, *MUON, *overrides, "refine.num_rollouts=16"))
