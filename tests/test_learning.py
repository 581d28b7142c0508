"""The policy gradient points the right way: one fixed batch of real text, the NSP loss alone, the binary reward."""

import inspect
import json
from pathlib import Path
from typing import Any

import torch

from megatron_refine.config import Config
from megatron_refine.records import Batch
from megatron_refine.step.reward import binary
from tests.parity import small_config

STEPS, WINDOW, WARM_UP = 30, 6, 12
LR, EPS = 3e-4, 1e-2  # of the NSP steps: close to plain gradient steps, so that shuffled rewards average out


def negated(tokens: Any, truth: Any, h_pred: Any, h_true: Any) -> Any:
    """Its advantages are the negated ones."""
    return -binary(tokens, truth, h_pred, h_true)


def shuffled(tokens: Any, truth: Any, h_pred: Any, h_true: Any) -> Any:
    """The same rewards, dealt anew to the rollouts of each position."""
    rewards = binary(tokens, truth, h_pred, h_true)
    order = torch.rand(rewards.shape, generator=torch.Generator().manual_seed(int(tokens.sum()))).argsort(-1)
    return rewards.gather(-1, order)


def every_24th(entropy: Any, lengths: Any, rollout_len: int) -> Any:
    """The same positions at every step: what changes is the policy alone."""
    return torch.where(torch.arange(entropy.shape[1]) % 24 == 12, 0.0, -torch.inf).expand(entropy.shape)


def text_batch() -> Batch:
    """Four rows of Python source, a character a token."""
    text = inspect.getsource(json) + inspect.getsource(inspect)
    tokens = torch.tensor([ord(c) % 97 for c in text[: 4 * 192]]).view(4, 192)
    return Batch(tokens, torch.full((4,), 192), torch.arange(4))


def rewards_over_steps(config: Config) -> list[tuple[float, float]]:
    """On a rank: (mean binary reward, its sampling variance) of each REFINE step, after a warm-up on the same batch."""
    from megatron_refine.engine.native import NativeEngine
    from megatron_refine.step.refine import RefineStep
    from megatron_refine.trainer.model import build_model
    from megatron_refine.trainer.optimizer import Updater
    from megatron_refine.trainer.parallel import init_parallel

    ranks = init_parallel(config)
    model = build_model(config, ranks)
    step = RefineStep(config, model, NativeEngine(model), Updater(config, model, ranks), ranks)
    batch, found = text_batch(), []
    for i in range(WARM_UP):
        step(batch, i, refine=False)
    gentle = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"lr": LR, "eps": EPS})})
    step.updater = Updater(gentle, model, ranks)  # fresh moments: Adam would go on along the warm-up's direction
    for i in range(STEPS):
        step(batch, 100 + i, refine=True)
        assert step.last is not None
        records = step.last
        rewards = binary(records.experience.tokens, records.truth, torch.empty(0), torch.empty(0))
        found.append((float(rewards.mean()), float(rewards.var(-1).mean() / rewards.numel())))
    return found


def change_in_standard_errors(ranks: Any, tmp_path: Path, reward: str) -> float:
    settings = ["refine.ntp_coef=0", "refine.nsp_coef=1", "refine.num_rollouts=16", "refine.num_chunks=8"]
    settings += ["train.micro_batch_size=4", "optimizer.lr=3e-3", "optimizer.weight_decay=0", "model.init_std=0.05"]
    settings += ["refine.selection=tests.test_learning:every_24th", f"refine.reward={reward}"]
    config = small_config(tmp_path, *settings)
    found = torch.tensor(ranks(1, rewards_over_steps, config=config)[0], dtype=torch.float64)
    first, last = found[:WINDOW], found[-WINDOW:]
    error = (first[:, 1].sum() + last[:, 1].sum()).sqrt() / WINDOW
    return float((last[:, 0].mean() - first[:, 0].mean()) / error)


def test_true_rewards_raise_the_reward(ranks: Any, tmp_path: Path) -> None:
    assert change_in_standard_errors(ranks, tmp_path, "binary") > 5


def test_negated_advantages_lower_it(ranks: Any, tmp_path: Path) -> None:
    assert change_in_standard_errors(ranks, tmp_path, "tests.test_learning:negated") < -5


def test_shuffled_advantages_do_neither(ranks: Any, tmp_path: Path) -> None:
    assert abs(change_in_standard_errors(ranks, tmp_path, "tests.test_learning:shuffled")) < 5
