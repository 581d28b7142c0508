"""engine.lag=1: rollouts of the next batch, written while the trainer updates."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_refine.config import Config, ConfigError
from megatron_refine.records import Batch, Fork, RolloutRequest, Rollouts
from tests.parity import batch, full_gradients, relative, small_config
from tests.test_step import make_step

LAG = ["engine.kind=sglang", "engine.python=python3", "engine.lag=1", "engine.importance_cap=2"]
LAYOUTS = {
    "fused": (1, []),
    "two_pass tp2 sp": (2, ["update.mode=two_pass", "parallel.tp=2", "parallel.sp=true"]),
    "mini pp2": (2, ["parallel.pp=2", "update.mini_batch_size=2"]),
    "fused dp2": (2, ["train.micro_batch_size=1"]),
}


class Ahead:
    """Writes when it is asked, with the weights of that moment, by the native engine's draws."""

    def __init__(self, model: Any):
        from megatron_refine.engine.native import NativeEngine

        self.model, self.native = model, NativeEngine(model)
        self.asked: list[tuple[RolloutRequest, Rollouts]] = []

    def sync(self, weight_version: int) -> None:
        self.native.sync(weight_version)

    def begin(self, request: RolloutRequest) -> Rollouts:
        from megatron_refine.kernels.places import Places
        from megatron_refine.trainer import forward

        assert request.fork is None
        with torch.no_grad():
            main, places = forward.main_pass(self.model, request.tokens), Places.of_each(request.positions)
            fork = Fork(main.states(places), main.rows.take(places.tokens - 1, places.sequences))
        written = self.native.rollout(replace(request, fork=fork))
        self.asked.append((request, written))
        return written

    def finish(self, begun: Rollouts, weight_version: int) -> Rollouts:
        return begun


@torch.no_grad()
def move(model: Any, factor: float) -> None:
    for parameter in model.parameters():
        parameter.mul_(factor)


def mine(step: Any, seed: int) -> Batch:
    share = 4 // step.ranks.dp
    return batch(4, seed=seed).rows(slice(share * step.ranks.dp_rank, share * (step.ranks.dp_rank + 1)))


def lagging(config: Config) -> Any:
    """On a rank: three steps with lag, the weights moved by hand between them. By the slow way: for each, rollouts
    drawn by a step without lag at the weights of the step before, handed to a step at those of its own."""
    plain = config.model_copy(update={"engine": config.engine.model_copy(update={"lag": 0})})
    step, slow = make_step(config, torch.float64), make_step(plain, torch.float64)
    step.engine, found = Ahead(step.model), []
    for at in range(3):
        following = mine(step, at + 1) if at < 2 else None
        metrics = step(mine(step, at), at, True, following)
        fast = full_gradients(step.model)
        if at:
            move(slow.model, 1 / 0.97)  # the weights of the step before
        explored = [slow.explore(mine(step, at).rows(i), at, False)[0] for i in slow._micros(mine(step, at))]
        if at:
            move(slow.model, 0.97)
        request, written = step.engine.asked[at]
        assert request.positions.allclose(torch.cat([x.experience.positions for x in explored]))
        assert written.tokens.equal(torch.cat([x.experience.tokens for x in explored])) and request.step == at
        slow.engine.rollout = handing(written)
        slow._select = lambda b, *_, request=request: request.positions[torch.isin(request.sample_ids, b.sample_ids)]
        expected = slow(mine(step, at), at, True)
        del slow.engine.rollout, slow._select
        found.append((metrics, expected, max(relative(fast, full_gradients(slow.model)).values())))
        for model in (step.model, slow.model):
            move(model, 0.97)
    return found, step._begun


def handing(written: Rollouts) -> Any:
    """A `rollout` that hands out, micro-batch by micro-batch, what was written before."""
    rest = [written]

    def rollout(request: RolloutRequest) -> Rollouts:
        held, size = rest.pop(), len(request.tokens)
        rest.append(Rollouts(held.tokens[size:], held.logprobs[size:], held.weight_version))
        return Rollouts(held.tokens[:size], held.logprobs[:size], held.weight_version)

    return rollout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_learns_from_rollouts_of_the_weights_before(ranks: Any, tmp_path: Path, layout: str) -> None:
    world, overrides = LAYOUTS[layout]
    for found, left in ranks(world, lagging, config=small_config(tmp_path, *LAG, *overrides)):
        assert left is None and len(found) == 3
        for at, (metrics, expected, error) in enumerate(found):
            assert error < 1e-10  # fp64: the same products in another order
            assert metrics["rollout/weight_version"] == max(at - 1, 0)
            for key in ("train/nsp_loss", "rollout/reward_mean", "rollout/logprob_gap_mean", "rollout/importance_mean"):
                assert metrics[key] == pytest.approx(expected[key], rel=1e-9, abs=1e-12), key
            assert (metrics["rollout/logprob_gap_mean"] > 1e-3) == (at > 0)  # of weights 3 % smaller; of its own


def test_a_run_asks_for_the_batch_that_it_then_trains_on(tmp_path: Path) -> None:
    """By the rule of when there is a batch to ask for; test_sglang_train has whole runs."""
    config = small_config(tmp_path, *LAG, "refine.start_step=2", "train.steps=6")
    assert [config.ahead(step, 6) for step in range(8)] == [False] * 3 + [True] * 3 + [False] * 2
    assert not small_config(tmp_path, "refine.start_step=2").ahead(3, 6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["engine.lag=1"], "engine.lag=1: is for servers that write beside the training; set engine.lag=0"),
        (
            [*LAG, "engine.importance_cap=0"],
            "engine.lag=1: rollouts of older weights need importance weights; set engine.importance_cap=2",
        ),
        (
            [*LAG, "engine.offload=true"],
            "engine.lag=1: servers write during the update, engine.offload=true before; drop one",
        ),
        (
            [*LAG, "train.phase=testtime", "task.paths=[x.jsonl]"],
            "engine.lag=1: train.phase=testtime learns from each batch before it reads the next; set engine.lag=0",
        ),
    ],
)
def test_what_lag_does_not_go_with(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        small_config(tmp_path, *overrides)
    assert str(error.value) == message
