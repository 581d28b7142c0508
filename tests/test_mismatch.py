"""An engine whose log-probabilities are not the trainer's: weights, masks and the stop.

The engines here are the native one with a known error added to its log-probabilities.
"""

import itertools
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_refine.config import Config
from megatron_refine.errors import MismatchError
from megatron_refine.records import Batch, RolloutRequest, Rollouts
from megatron_refine.step.mismatch import check_gap, logprob_gap, token_weights
from tests import runs
from tests.lanes import short
from tests.parity import batch, build, full_gradients, relative, small_config
from tests.test_branches import separate
from tests.test_step import GradientsOnly

NAN, INF = math.nan, math.inf
TEMPERATURE = 0.8
NOISE, MASK, CAP = 0.5, 0.45, 1.2  # 59% of the rollouts have no gap above MASK; a third of their ratios exceed CAP


def tensors(engine: list[list[float]]) -> tuple[Tensor, Tensor]:
    """The trainer's log-probabilities, -2 everywhere, and the engine's: of one position, [1, 1, n, k]."""
    logprobs = torch.tensor(engine, dtype=torch.float64)[None, None]
    return torch.full_like(logprobs, -2.0), logprobs


def test_gaps_by_hand() -> None:
    old, engine = tensors([[-2.0, -2.5, -1.0], [NAN, -INF, INF]])
    assert logprob_gap(old, engine).tolist() == [[[[0.0, 0.5, 1.0], [INF, INF, INF]]]]
    old[..., 0] = NAN  # the trainer's own failure, whatever the engine says
    assert logprob_gap(old, engine)[..., 0].isnan().all()


def test_weights_by_hand() -> None:
    old, engine = tensors([[-2.0, -2.5, -1.5], [-2.0, -2.0, -3.25], [-2.0, NAN, -2.0], [-INF, -2.0, -2.0]])
    capped = token_weights(old, engine, 1.0, 1.5)[0, 0]
    expected = [[1.0, 1.5, 0.6065306597126334], [0.0] * 3, [0.0] * 3, [0.0] * 3]  # exp(0.5) = 1.65, exp(-0.5)
    torch.testing.assert_close(capped, torch.tensor(expected, dtype=torch.float64), rtol=1e-15, atol=0)
    assert token_weights(old, engine, 1.0, 0.0)[0, 0].tolist() == [[1.0] * 3, [0.0] * 3, [0.0] * 3, [0.0] * 3]
    wide = token_weights(old, engine, 1e9, 1.5)[0, 0]  # finite gaps pass, the others never do
    assert wide[1].tolist() == [1.0, 1.0, 1.5] and not wide[2:].any()
    assert not token_weights(old.fill_(NAN), engine, 1e9, 1.5).any()
    assert not token_weights(old.clone().requires_grad_(), engine, 1.0, 1.5).requires_grad


def test_a_gap_at_the_limit_is_none_above_it() -> None:
    old, engine = tensors([[-2.5, -2.0]])
    assert token_weights(old, engine, 0.5, 0.0).all() and not token_weights(old, engine, 0.499, 0.0).any()
    check_gap(0.2, 0.5, 0.2, 3)
    check_gap(NAN, INF, 0.2, 3)  # the trainer's
    for mean in (0.25, INF):
        with pytest.raises(MismatchError, match=rf"^step 3: .* {mean:g} nats .* inf\), above engine.stop_gap=0.2; .+$"):
            check_gap(mean, INF, 0.2, 3)


def noise(request: RolloutRequest) -> Tensor:
    """[B, c, n, k] in +-NOISE: a function of the sample and the place in its rollouts, the same at any layout."""
    from megatron_refine.trainer.random import uniform

    shape = (request.positions.shape[1], request.num_rollouts, request.rollout_len)
    places = torch.arange(math.prod(shape)).view(shape)
    return NOISE * (2 * uniform(7, request.sample_ids[:, None, None, None], places) - 1)


class Noisy:
    """The native engine with noise; NaN for the sample 3, which is too short for rollouts, and for those of `lost`."""

    def __init__(self, model: Any, lost: tuple[int, ...] = ()):
        from megatron_refine.engine.native import NativeEngine

        self.native, self.lost = NativeEngine(model), torch.tensor([3, *lost])
        self.written: list[Rollouts] = []

    def sync(self, weight_version: int) -> None:
        self.native.sync(weight_version)

    def rollout(self, request: RolloutRequest) -> Rollouts:
        exact = self.native.rollout(request)
        lost = torch.isin(request.sample_ids, self.lost)[:, None, None, None]
        self.written.append(replace(exact, logprobs=(exact.logprobs + noise(request)).masked_fill(lost, NAN)))
        return self.written[-1]


def noisy_config(folder: Path, *overrides: str) -> Config:
    limits = [f"engine.importance_cap={CAP}", f"engine.mask_gap={MASK}", "engine.stop_gap=1.0"]
    return small_config(folder, f"refine.rollout_temperature={TEMPERATURE}", *limits, *overrides)


def noisy_step(config: Config, lost: tuple[int, ...] = ()) -> tuple[Any, Batch, list[Any]]:
    """On a rank: a step that leaves its gradient in the model, this rank's sequences, and what it will explore."""
    from megatron_refine.data.order import rank_samples
    from megatron_refine.step.refine import RefineStep

    explored: list[Any] = []

    class Recorded(RefineStep):
        def explore_wave(self, batches: Any, *args: Any, **kwargs: Any) -> Any:
            found = super().explore_wave(batches, *args, **kwargs)
            explored.extend((b, record.experience) for b, (record, _) in zip(batches, found, strict=True))
            return found

    model, ranks = build(config, torch.float64)
    step = Recorded(config, model, Noisy(model, lost), GradientsOnly(model, ranks), ranks)  # type: ignore[arg-type]
    b = batch(4)
    b = Batch(b.tokens, torch.tensor([192, 185, 150, 10]), b.sample_ids)
    mine = torch.from_numpy(rank_samples(0, 4, 4, ranks.dp_rank, ranks.dp))
    return step, Batch(*(field[mine] for field in vars(b).values())), explored


def gradients(config: Config) -> Any:
    step, b, _ = noisy_step(config)
    return step(b, 0, refine=True), full_gradients(step.model)


@torch.no_grad()
def reward(model: Any, text: Tensor, position: int, written: Tensor) -> float:
    """The mean cosine of the states after each token that was written and after each that is really there."""
    from megatron_refine.trainer import forward

    def states(tokens: Tensor) -> Tensor:
        return forward._rows(model, tokens[None], forward.Branches(main_len=len(tokens))).local[position:, 0]

    true, own = states(text[: position + 5]), states(torch.cat([text[:position], written]))
    products, lengths = (own * true).sum(-1), own.norm(dim=-1) * true.norm(dim=-1)
    return float((products / lengths).mean())


def slow(config: Config) -> Any:
    """On a rank: what `gradients` returns, by the definition: a forward a prefix, a loop over rollout tokens."""
    from megatron_refine.trainer.gradients import finalize_gradients

    step, b, explored = noisy_step(config)
    step(b, 0, refine=True)
    step.model.zero_grad_buffer()
    ntp, nsp, targets, tokens, rollouts, weights, gaps = torch.tensor(0.0).double(), 0.0, 0, 0, 0, [], []
    earned: list[float] = []
    for (micro, e), written in zip(explored, step.engine.written, strict=True):
        main, branch = separate(step.model, micro, e, TEMPERATURE)
        for i, length in enumerate(micro.lengths.tolist()):
            ntp, targets = ntp - main[i, : length - 1].sum(), targets + length - 1
            for j, r in itertools.product(range(4), range(2)) if length > 10 else ():
                rewards = [
                    reward(step.model, micro.tokens[i], int(e.positions[i, j]), e.tokens[i, j, m]) for m in (0, 1)
                ]
                new, advantage = branch[i, j, r], float(e.advantages[i, j, r])
                expected = (rewards[r] - sum(rewards) / 2) / (statistics.stdev(rewards) + 1e-6)
                assert advantage == pytest.approx(expected, rel=1e-4)  # rewards are fp32
                earned.append(rewards[r])
                apart = (new.detach() - written.logprobs[i, j, r]).tolist()
                gaps, tokens, rollouts = gaps + [abs(d) for d in apart], tokens + 5, rollouts + 1
                if max(abs(d) for d in apart) <= MASK:
                    own = [min(math.exp(d), CAP) for d in apart]
                    weights += own
                    for t in range(5):
                        nsp = nsp - own[t] * advantage * (new[t] - new[t].detach()).exp()
    assert tokens == 3 * 4 * 2 * 5 and 0 < weights.count(CAP) < len(weights) < tokens
    (ntp / targets + 0.7 * nsp / tokens).backward()
    finalize_gradients([step.model])
    metrics = {
        "train/ntp_loss": float(ntp / targets), "train/nsp_loss": float(nsp / tokens),
        "train/ratio_mean": 1.0, "train/clip_fraction": 0.0, "rollout/reward_mean": statistics.mean(earned),
        "rollout/reward_std": statistics.pstdev(earned), "rollout/zero_variance_groups": 0.0,
        "rollout/masked_fraction": 1 - len(weights) / tokens, "rollout/importance_mean": sum(weights) / len(weights),
        "rollout/logprob_gap_mean": sum(gaps) / tokens, "rollout/logprob_gap_max": max(gaps),
    }  # fmt: skip
    return metrics, full_gradients(step.model)


@pytest.fixture(scope="module")
def reference(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return ranks(1, slow, config=noisy_config(tmp_path_factory.mktemp("reference")))[0]


@pytest.mark.parametrize(
    ("world", "layout", "mode"),
    short(
        [
            (world, layout, mode)
            for world, layout in ((1, []), (2, runs.TP2), (2, ["train.micro_batch_size=1"]))
            for mode in ("fused", "two_pass")
        ],
        lambda world, layout, mode: (mode == "fused") == (layout is runs.TP2),
    ),
)
def test_weighted_steps_give_the_gradient_of_the_definition(
    ranks: Any, reference: Any, tmp_path: Path, mode: str, world: int, layout: Any
) -> None:
    expected, expected_gradients = reference
    for metrics, found in ranks(world, gradients, config=noisy_config(tmp_path, f"update.mode={mode}", *layout)):
        assert max(relative(found, expected_gradients).values()) < 1e-10  # fp64: the same sums in another order
        for key, value in expected.items():
            assert metrics[key] == pytest.approx(value, rel=1e-5 if "reward" in key else 1e-10, abs=1e-12), key


def lost_rollouts(config: Config) -> Any:
    """On a rank: what a step says to an engine with NaN for every token, its gradient, and one on next tokens alone."""
    step, b, explored = noisy_step(config, lost=(0, 1, 2))
    try:
        step(b, 0, refine=True)
    except MismatchError as error:
        message, found = str(error), full_gradients(step.model)
        step(b, 0, refine=False)
        return message, found, full_gradients(step.model), sum(float(e.weights.abs().sum()) for _, e in explored)
    return None


@pytest.mark.parametrize("mode", ["fused", "two_pass"])
def test_masked_rollouts_teach_nothing(ranks: Any, tmp_path: Path, mode: str) -> None:
    message, found, expected, weight = ranks(1, lost_rollouts, config=noisy_config(tmp_path, f"update.mode={mode}"))[0]
    assert message.startswith("step 1: ") and "inf nats" in message and not weight
    assert max(relative(found, expected).values()) < 1e-10  # fp64


def drifting_command(arguments: list[str], first_step: int) -> runs.End:
    """On a rank: the training command; from `first_step` on, and in evaluations, rank 1's log-probabilities are off."""
    from megatron_refine.engine.native import NativeEngine

    rollout = NativeEngine.rollout

    def drifting(self: Any, request: RolloutRequest) -> Rollouts:
        exact = rollout(self, request)
        far = 0.5 * (request.step + 1 >= first_step and torch.distributed.get_rank() == 1)
        return replace(exact, logprobs=exact.logprobs + far)

    with mock.patch.object(NativeEngine, "rollout", drifting):
        return runs.command(arguments)


@pytest.mark.slow
def test_a_run_with_an_engine_that_drifts_stops_with_its_checkpoint(ranks: Any, tmp_path: Path) -> None:
    """One of two data-parallel ranks is 0.5 nats off, 0.25 in the mean of both: in evaluations, and from step 4 on."""
    config = runs.write_config(tmp_path, tmp_path / "data", checkpoint={"every": 3}, eval={"every": 1, "sequences": 4})
    arguments = ["--config", str(config)]
    ends = ranks(2, drifting_command, arguments=arguments, first_step=4)
    assert [end.code for end in ends] == [6, 6]
    assert ends[0].err.startswith("step 4: ") and "0.25 nats" in ends[0].err and "engine.stop_gap=0.2;" in ends[0].err
    assert ends[0].err.count("\n") == 1 and not ends[1].err
    checkpoints = tmp_path / "run/checkpoints"
    assert {p.name for p in checkpoints.iterdir()} == {"step_0000003", "latest"}
    assert [row["step"] for row in runs.rows(tmp_path)] == [0, 1, 2, 3]
    ends = ranks(2, runs.command, arguments=arguments, saves=False)
    assert [end.code for end in ends] == [0, 0] and "step 3/6" in ends[0].out
