"""Rollouts at a temperature other than 1: the gradient of a step is that of the expected reward of what is drawn.

A bandit: rollouts of one token, so that a prefix is one state with an action for each id. The engine here writes every
id once and says that it drew them uniformly; the importance weights then make a step's policy loss the sum over all ids
of probability at the temperature times advantage. Its gradient is compared with that of the sum itself.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_refine.config import Config
from megatron_refine.records import RolloutRequest, Rollouts
from tests.lanes import short
from tests.parity import batch, build, full_gradients, relative, small_config
from tests.test_step import GradientsOnly
from tests.zygote import Zygote

VOCAB = 97


class EveryId:
    """Each id of the vocabulary once at each position, as if drawn uniformly."""

    def sync(self, weight_version: int) -> None:
        """There is nothing to move."""

    def rollout(self, request: RolloutRequest) -> Rollouts:
        tokens = torch.arange(VOCAB).expand(*request.positions.shape, VOCAB)[..., None].clone()
        uniform = torch.full(tokens.shape, 1 / VOCAB, dtype=torch.float64)
        return Rollouts(tokens, uniform.log(), 0)


def bandit(folder: Path, temperature: float, *overrides: str) -> Config:
    shape = ["refine.num_chunks=2", f"refine.num_rollouts={VOCAB}", "refine.rollout_len=1", "refine.reward=hybrid"]
    trust = ["engine.importance_cap=1e9", "engine.mask_gap=1e9", "engine.stop_gap=1e9"]
    return small_config(folder, f"refine.rollout_temperature={temperature}", *shape, *trust, *overrides)


def sampled(config: Config, modes: list[str]) -> dict[str, Any]:
    """On a rank: metrics and gradients of a step by mode."""
    from megatron_refine.step.refine import RefineStep

    found = {}
    for mode in modes:
        update = config.update.model_copy(update={"mode": mode})
        model, ranks = build(config, torch.float64)
        own = config.model_copy(update={"update": update})
        step = RefineStep(own, model, EveryId(), GradientsOnly(model, ranks), ranks)  # type: ignore[arg-type]
        found[mode] = step(batch(4), 0, refine=True), full_gradients(model), step.last
    return found


def enumerated(config: Config) -> tuple[dict[str, float], Any]:
    """On a rank: loss, mean gap and gradient by the definition, from a whole forward of each prefix."""
    from megatron_refine.models.layout import Branches
    from megatron_refine.step.refine import RefineStep
    from megatron_refine.trainer import forward

    model, ranks = build(config, torch.float64)
    step = RefineStep(config, model, EveryId(), GradientsOnly(model, ranks), ranks)  # type: ignore[arg-type]
    inner, whole, temperature = forward.unwrap(model), batch(4), config.refine.rollout_temperature or 1.0
    model.zero_grad_buffer()

    def logits(text: Any) -> Any:
        return inner.logits(forward._rows(model, text[None], Branches(main_len=len(text))).local[:, 0])

    ntp, expected, gaps, targets = torch.zeros((), dtype=torch.float64), 0.0, [], 0
    for b in range(4):
        tokens = whole.tokens[b, : int(whole.lengths[b])]
        ntp = ntp - logits(tokens)[:-1].log_softmax(-1).gather(1, tokens[1:, None]).sum()
        targets += len(tokens) - 1
        with torch.no_grad():
            explored = step.explore(whole.rows(slice(b, b + 1)), 0, keep_graph=False)[0].experience
        for j, p in enumerate(explored.positions[0].tolist()):
            chances = (logits(tokens[:p])[-1, :VOCAB] / temperature).softmax(-1)
            expected = expected + (chances * explored.advantages[0, j]).sum()
            gaps.append((chances.detach().log() + torch.tensor(VOCAB).log()).abs().mean())
    nsp = -expected / 8  # of the expected advantage at a position
    (ntp / targets + 0.7 * nsp).backward()
    metrics = {
        "train/ntp_loss": float(ntp.detach()) / targets, "train/nsp_loss": float(nsp.detach()),
        "rollout/logprob_gap_mean": float(torch.stack(gaps).mean()), "rollout/importance_mean": 1.0,
    }  # fmt: skip
    return metrics, full_gradients(model)


@pytest.mark.parametrize(
    ("temperature", "world", "layout"),
    [(0.5, 2, ["parallel.cp=2"]), (2.0, 2, ["parallel.pp=2"]), (0.0, 1, [])],
)
def test_a_step_has_the_gradient_of_the_expected_reward(
    temperature: float, world: int, layout: list[str], ranks: Zygote, tmp_path: Path
) -> None:
    """Greedy rollouts, at temperature 0, are scored at 1."""
    expected, gradients = ranks(1, enumerated, config=bandit(tmp_path, temperature))[0]
    modes = ["two_pass"] if "parallel.pp=2" in layout else ["fused", "two_pass"]
    for found in ranks(world, sampled, config=bandit(tmp_path, temperature, *layout), modes=modes):
        for mode, (metrics, own, last) in found.items():
            worst = max(relative(own, gradients).items(), key=lambda item: item[1])
            assert worst[1] < 1e-10, (mode, worst)  # fp64: the same products in another order
            for key, value in expected.items():
                assert metrics[key] == pytest.approx(value, rel=1e-6, abs=1e-9), (mode, key)
            chances = last.experience.old_logprobs.exp().sum(2)
            torch.testing.assert_close(chances, torch.ones_like(chances), rtol=0, atol=1e-10)


def scored(config: Config) -> list[Any]:
    """On a rank: log-probabilities of two rows, each token's at a temperature of its own; together and one by one."""
    from megatron_refine.trainer.forward import score_pass

    model, _ = build(config, torch.float64)
    tokens = batch(2).tokens
    temperatures = torch.linspace(0.5, 2.0, tokens.numel(), dtype=torch.float64).view(tokens.shape)
    with torch.no_grad():
        alone = [score_pass(model, tokens[i : i + 1], temperatures[i : i + 1]).logprobs[0] for i in range(2)]
        plain = score_pass(model, tokens).logprobs
        return [score_pass(model, tokens, temperatures).logprobs, torch.stack(alone), plain]


@pytest.mark.parametrize("overrides", short([[], ["parallel.tp=2", "parallel.sp=true"]], lambda words: not words))
def test_each_token_is_scored_at_its_own_temperature(overrides: list[str], ranks: Zygote, tmp_path: Path) -> None:
    for together, alone, plain in ranks(1 + bool(overrides), scored, config=small_config(tmp_path, *overrides)):
        assert torch.allclose(together, alone, rtol=0, atol=1e-10)
        assert not torch.allclose(together, plain, rtol=0, atol=1e-2)
