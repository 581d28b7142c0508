"""The policy gradient points the right way: one fixed batch of real text, the NSP loss alone, the binary reward."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_refine.config import Config
from megatron_refine.records import Batch
from megatron_refine.step.reward import binary
from megatron_refine.study.findings import CONTROL
from tests.parity import small_config

STEPS, WINDOW, WARM_UP = 30, 6, 12
LR, EPS = 3e-4, 1e-2  # of the NSP steps: close to plain gradient steps, so that shuffled rewards average out


def negated(tokens: Any, truth: Any, h_pred: Any, h_true: Any) -> Any:
    """Its advantages are the negated ones."""
    return -binary(tokens, truth, h_pred, h_true)


def every_24th(entropy: Any, lengths: Any, rollout_len: int) -> Any:
    """The same positions at every step: what changes is the policy alone."""
    return torch.where(torch.arange(entropy.shape[1]) % 24 == 12, 0.0, -torch.inf).expand(entropy.shape)


def text_batch() -> Batch:
    """Four rows of Python source, a character a token."""
    text = inspect.getsource(json) + inspect.getsource(inspect)
    tokens = torch.tensor([ord(c) % 97 for c in text[: 4 * 192]]).view(4, 192)
    return Batch(tokens, torch.full((4,), 192), torch.arange(4))


REWARDS = {"true": "binary", "negated": "tests.test_learning:negated", "shuffled": CONTROL}


def rewards_over_steps(config: Config, kinds: list[str]) -> dict[str, list[tuple[float, float]]]:
    """On a rank: (mean binary reward, its sampling variance) of each REFINE step, by what it learns from.

    All start from the weights of one warm-up on the same batch.
    """
    from megatron_refine.engine.native import NativeEngine
    from megatron_refine.step.refine import RefineStep
    from megatron_refine.trainer.model import build_model
    from megatron_refine.trainer.optimizer import Updater
    from megatron_refine.trainer.parallel import init_parallel

    ranks = init_parallel(config)
    model, batch = build_model(config, ranks), text_batch()
    warm_up = Updater(config, model, ranks)
    step = RefineStep(config, model, NativeEngine(model), warm_up, ranks)
    for i in range(WARM_UP):
        step(batch, i, refine=False)
    weights, found = warm_up.weights(), dict[str, list[tuple[float, float]]]()
    for kind in kinds:
        gentle = config.model_copy(
            update={
                "optimizer": config.optimizer.model_copy(update={"lr": LR, "eps": EPS}),
                "refine": config.refine.model_copy(update={"reward": REWARDS[kind]}),
            }
        )
        updater = Updater(gentle, model, ranks)  # fresh moments: Adam would go on along the warm-up's direction
        updater.restart(weights)
        step, found[kind] = RefineStep(gentle, model, NativeEngine(model), updater, ranks), []
        for i in range(STEPS):
            step(batch, 100 + i, refine=True)
            assert step.last is not None
            records = step.last
            rewards = binary(records.experience.tokens, records.truth, torch.empty(0), torch.empty(0))
            found[kind].append((float(rewards.mean()), float(rewards.var(-1).mean() / rewards.numel())))
    return found


def changes(ranks: Any, tmp_path: Path, *kinds: str) -> dict[str, float]:
    """Of the mean reward, from the first to the last steps, in standard errors, by what the run learns from."""
    settings = ["refine.ntp_coef=0", "refine.nsp_coef=1", "refine.num_rollouts=16", "refine.num_chunks=8"]
    settings += ["train.micro_batch_size=4", "optimizer.lr=3e-3", "optimizer.weight_decay=0", "model.init_std=0.05"]
    settings += ["refine.selection=tests.test_learning:every_24th"]
    found = ranks(1, rewards_over_steps, config=small_config(tmp_path, *settings), kinds=list(kinds))[0]

    def change(rewards: torch.Tensor) -> float:
        first, last = rewards[:WINDOW], rewards[-WINDOW:]
        error = (first[:, 1].sum() + last[:, 1].sum()).sqrt() / WINDOW
        return float((last[:, 0].mean() - first[:, 0].mean()) / error)

    return {kind: change(torch.tensor(rewards, dtype=torch.float64)) for kind, rewards in found.items()}


@pytest.mark.slow
def test_true_rewards_raise_the_reward(ranks: Any, tmp_path: Path) -> None:
    assert changes(ranks, tmp_path, "true")["true"] > 5


@pytest.mark.slow
def test_negated_advantages_lower_it_and_shuffled_ones_do_neither(ranks: Any, tmp_path: Path) -> None:
    found = changes(ranks, tmp_path, "negated", "shuffled")
    assert found["negated"] < -5 and abs(found["shuffled"]) < 5
