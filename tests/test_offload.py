"""Gradients and optimizer state in the host's memory during rollouts: no bit of a step changes (engine.offload)."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_refine.config import Config, ConfigError
from megatron_refine.engine.errors import EngineError
from megatron_refine.engine.native import NativeEngine
from megatron_refine.records import RolloutRequest, Rollouts
from tests import runs
from tests.lanes import short
from tests.parity import small_config
from tests.test_checkpoint import part, start
from tests.test_updates import OVERLAP
from tests.zygote import Zygote

SERVED = ["engine.kind=sglang", "engine.urls=[http://127.0.0.1:1]", "train.micro_batch_size=1"]
CASES: dict[str, tuple[int, str, list[str]]] = {  # ranks, family, overrides; four sequences a batch, one a micro-batch
    "fused, bf16, dp2, overlapped": (2, "delta_net", ["update.mode=fused", "train.precision=bf16", *OVERLAP]),
    "two-pass, fp32, dp2": (2, "gated_delta_net", ["update.mode=two_pass"]),
    "fused, fp32": (1, "delta_net", ["update.mode=fused"]),
    "two-pass, bf16, mini-batches": (
        1, "delta_net", ["update.mode=two_pass", "train.precision=bf16", "update.mini_batch_size=2"]
    ),
    "two-pass, bf16, pp2": (2, "delta_net", ["update.mode=two_pass", "train.precision=bf16", "parallel.pp=2"]),
    "two-pass, bf16, tp2 dp2, tied": (
        4, "delta_net", ["update.mode=two_pass", "train.precision=bf16", "model.tie_embeddings=true", *runs.TP2]
    ),
}  # fmt: skip


class Watching(NativeEngine):
    """Writes native rollouts where servers would, and notes what holds memory meanwhile."""

    def __init__(self, step: Any, fails_at: int):
        """fails_at: the call, from 1, that raises EngineError; 0: none."""
        super().__init__(step.model)
        self.updater, self.fails_at = step.updater, fails_at
        self.held: list[dict[str, int]] = []

    def rollout(self, request: RolloutRequest) -> Rollouts:
        self.held.append({name: bytes_of(tensors) for name, tensors in kinds(self.updater).items()})
        if len(self.held) == self.fails_at:
            raise EngineError("a server is gone")
        return super().rollout(request)


def kinds(updater: Any) -> dict[str, list[torch.Tensor]]:
    """What an optimizer step reads and writes on this rank."""
    adams = [part.optimizer for part in updater.parts]
    moments = [v for adam in adams for state in adam.state.values() for v in state.values()]
    return {
        "weights": list(updater.model.parameters()),
        "gradients": [parameter.main_grad for parameter in updater.model.parameters()],
        "moments": moments,
        "main": [p for adam in adams for group in adam.param_groups for p in group["params"]],
    }


def bytes_of(tensors: list[torch.Tensor]) -> int:
    """Of the tensors' storages, each counted once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def trained(config: Config, fails_at: int = 0) -> dict[str, Any]:
    """On a rank: two REFINE steps, one on next tokens, a third REFINE step; every tensor and the metrics.

    A step that the engine fails is made again. Checkpoints of `config.run.dir` are resumed; one is saved in the end.
    """
    from megatron_refine.checkpoint.checkpoints import Progress

    step, checkpoints = start(config)
    before = {name: bytes_of(tensors) for name, tensors in kinds(step.updater).items()}
    step.engine = engine = Watching(step, fails_at)
    resumed = checkpoints.load_latest(step.updater, print)
    metrics, first = [], resumed.step if resumed else 0
    for i in range(first, first + 4):
        try:
            metrics.append(step(part(i, step), i, refine=i % 4 != 2))
        except EngineError:
            metrics.append(step(part(i, step), i, refine=i % 4 != 2))
    checkpoints.save(Progress(first + 4, 4 * (first + 4), "rows"), step.updater)
    tensors = {name: [t.detach().clone() for t in found] for name, found in kinds(step.updater).items()}
    after = {name: bytes_of(found) for name, found in kinds(step.updater).items()}
    return {"metrics": metrics, "tensors": tensors, "before": before, "held": engine.held, "after": after}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    own = ("time/", "engine/offloaded_bytes")
    for mine, theirs in zip(found["metrics"], expected["metrics"], strict=True):
        assert {k: v for k, v in mine.items() if not k.startswith(own)} == {
            k: v for k, v in theirs.items() if not k.startswith(own)
        }
    for name, tensors in expected["tensors"].items():
        assert tensors and any(t.any() for t in tensors), name
        for a, b in zip(found["tensors"][name], tensors, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b), name


def configured(folder: Path, case: str, *more: str) -> tuple[int, Config]:
    folder.mkdir(exist_ok=True)
    world, family, overrides = CASES[case]
    return world, small_config(folder, *SERVED, *overrides, *more, model=family)


@pytest.mark.parametrize("case", short(CASES, lambda case: case == next(iter(CASES))))
def test_no_bit_changes_and_the_memory_is_free_meanwhile(ranks: Zygote, tmp_path: Path, case: str) -> None:
    """Also in steps after a resume. A fused update's later micro-batches add to the gradients of the first."""
    world, plain = configured(tmp_path / "plain", case)
    _, moved = configured(tmp_path / "moved", case, "engine.offload=true")
    for _ in ("started", "resumed"):
        expected, found = ranks(world, trained, config=plain), ranks(world, trained, config=moved)
        for mine, theirs in zip(found, expected, strict=True):
            assert_same(mine, theirs)
            before, shared = mine["before"], moved.train.precision == "fp32"
            assert theirs["held"] and all(held == before for held in theirs["held"]), "nothing moves unasked"
            free = {"weights": before["weights"], "gradients": 0, "moments": 0, "main": before["main"] * shared}
            assert len(mine["held"]) == len(theirs["held"]) and all(held == free for held in mine["held"])
            assert mine["after"] == before
            moving = before["gradients"] + before["moments"] + before["main"] * (not shared)
            assert [row.get("engine/offloaded_bytes") for row in mine["metrics"]] == [moving, moving, None, moving]
            assert not any("engine/offloaded_bytes" in row for row in theirs["metrics"])


@pytest.mark.parametrize("case", ["fused, fp32", "two-pass, fp32, dp2"])
def test_the_trainer_goes_on_after_failed_rollouts(ranks: Zygote, tmp_path: Path, case: str) -> None:
    """The second step's second micro-batch fails, and the step is made again: the bits of a run without failure."""
    world, plain = configured(tmp_path / "plain", case)
    _, moved = configured(tmp_path / "moved", case, "engine.offload=true")
    expected = ranks(world, trained, config=plain)
    calls = len(expected[0]["held"]) // 3  # a REFINE step's
    for mine, theirs in zip(ranks(world, trained, config=moved, fails_at=calls + 2), expected, strict=True):
        assert len(mine["held"]) == len(theirs["held"]) + 2
        assert_same(mine, theirs)


def run_beside(arguments: list[str]) -> runs.End:
    """On a rank: the training command, with native rollouts where servers would write them."""
    with mock.patch("megatron_refine.run.session._engine", lambda config, model, ranks, say: NativeEngine(model)):
        return runs.command(arguments, saves=False)


def test_a_run_says_the_bytes_once(ranks: Zygote, tmp_path: Path) -> None:
    engine = {"kind": "sglang", "urls": ["http://127.0.0.1:1"], "offload": True}
    path = runs.write_config(tmp_path, tmp_path / "data", engine=engine, train={"steps": 2}, eval={"sequences": 2})
    end = ranks(1, run_beside, arguments=["--config", str(path)])[0]
    assert end.code == 0 and not end.err, end.err
    bytes_moved = {row["engine/offloaded_bytes"] for row in runs.rows(tmp_path) if row["step"]}
    assert len(bytes_moved) == 1
    said = [line for line in end.out.splitlines() if line.startswith("offload: ")]
    assert said == [
        f"offload: {bytes_moved.pop() / 2**20:,.1f} MiB of gradients and optimizer state are in the host's memory "
        "during rollouts"
    ]


def test_without_servers_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="engine.offload=true: makes room for servers, and engine.kind=native has "):
        small_config(tmp_path, "engine.offload=true")
