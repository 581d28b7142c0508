"""Post-training and test-time training: the answers' step against a slow reference, restarts bit by bit, baselines."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_refine.config import Config, load
from megatron_refine.data.examples import Example
from megatron_refine.estimate.flops import matched_ratio
from megatron_refine.models.family import FAMILIES
from tests import parity
from tests.test_step import make_step
from tests.zygote import Zygote


def prompts() -> Any:
    """Six prompts of different lengths with answers of one to seven tokens."""
    from megatron_refine.data.prompts import Prompts

    generator = torch.Generator().manual_seed(2)
    lengths = [(60, 1), (101, 7), (64, 4), (33, 2), (90, 3), (75, 5)]
    ids = [[torch.randint(0, 97, (n,), generator=generator).int().numpy() for n in pair] for pair in lengths]
    examples = [Example("t", i, f"prompt {i}", (f"answer {i}",), 4) for i in range(len(lengths))]
    return Prompts(examples, [p for p, _ in ids], [a for _, a in ids], 0)


def answer_gradients(config: Config, slow: bool) -> Any:
    """On a rank: loss and every gradient of the step on the answers of one batch; or, slowly, of one sequence after
    the other, with a plain softmax."""
    from megatron_refine.checkpoint.checkpoints import Progress
    from megatron_refine.phases.posttrain import PostTraining
    from megatron_refine.trainer import forward
    from megatron_refine.trainer.gradients import finalize_gradients
    from megatron_refine.trainer.model import unwrap

    step = make_step(config, torch.float64)
    model = step.model
    phase = PostTraining(config, prompts(), step, torch.device("cpu"))
    if not slow:
        metrics = phase(Progress(), refine=False)
        return metrics["train/answer_loss"], parity.full_gradients(model)
    from megatron_refine.data.order import sample_rows

    parts, counts = list[torch.Tensor](), list[int]()
    model.zero_grad_buffer()
    for row in sample_rows(config.run.seed, 0, 4, 6).tolist():
        prompt, answer = (torch.from_numpy(x[row]).long() for x in (phase.prompts.prompts, phase.prompts.answers))
        rows = forward.main_pass(model, torch.cat([prompt, answer])[None]).rows
        logprobs = unwrap(model).logits(rows.local[len(prompt) - 1 : -1, 0])[:, :97].log_softmax(-1)
        parts.append(-logprobs.gather(1, answer[:, None]).sum())
        counts.append(len(answer))
    if config.task.answer_mean == "token":
        loss = torch.stack(parts).sum() / sum(counts)
    else:  # micro-batches of two sequences, one after the other
        loss = ((parts[0] + parts[1]) / sum(counts[:2]) + (parts[2] + parts[3]) / sum(counts[2:])) / 2
    loss.backward()
    finalize_gradients([model])
    return float(loss), parity.full_gradients(model)


@pytest.mark.parametrize(("model", "mean"), [("delta_net", "token"), ("lact", "token"), ("delta_net", "micro_batch")])
def test_the_step_on_answers_equals_one_sequence_after_another(
    model: str, mean: str, ranks: Zygote, tmp_path: Path
) -> None:
    """Loss and every gradient at tp 1, tp 2 with sp, dp 2: a mean over the answers' tokens, none of the prompts'."""
    post = ["train.phase=posttrain", "task.paths=[x]", "data.tokenizer=x", "refine.enabled=false"]
    post += ["task.inner_step=false", f"task.answer_mean={mean}"]

    def run(world: int, *overrides: str, slow: bool = False) -> Any:
        config = parity.small_config(tmp_path, *post, *overrides, model=model)
        return ranks(world, answer_gradients, config=config, slow=slow)[0]

    loss, gradients = run(1, slow=True)  # fp64: the same products in another order
    for world, overrides in ((1, ()), (2, ("parallel.tp=2", "parallel.sp=true")), (2, ())):
        found, grads = run(world, *overrides)
        assert found == pytest.approx(loss, rel=1e-12)
        for name, error in parity.relative(grads, gradients).items():
            assert error < 1e-10, (name, world, overrides)


def restarted(config: Config) -> Any:
    """On a rank: after two steps and a restart, are weights and moments those of the beginning, and is the next step
    the first one again? (Main weights are others in bf16 alone: test_precision.py.)"""
    step = make_step(config, torch.float32, optimizer=True)
    model, updater = step.model, step.updater
    first = updater.weights()
    state = [{k: v.clone() for k, v in s.items()} for part in updater.parts for s in part.optimizer.state.values()]
    metrics = [step(parity.batch(4), 0, refine=True)]
    after = [p.detach().clone() for p in model.parameters()]
    step(parity.batch(4, seed=1), 1, refine=True)
    assert not any(torch.equal(a, p) for a, p in zip(first, model.parameters(), strict=True))
    updater.skipped_in_a_row = 2
    updater.restart(first)
    assert updater.skipped_in_a_row == 0
    same = all(torch.equal(a, p) for a, p in zip(first, model.parameters(), strict=True))
    now = [s for part in updater.parts for s in part.optimizer.state.values()]
    moments = all(torch.equal(a[k], b[k]) for a, b in zip(state, now, strict=True) for k in a)
    metrics.append(step(parity.batch(4), 0, refine=True))
    again = all(torch.equal(a, p) for a, p in zip(after, model.parameters(), strict=True))
    losses = [{k: v for k, v in m.items() if not k.startswith("time/")} for m in metrics]
    return same, moments, again, losses[0] == losses[1]


@pytest.mark.parametrize("world, overrides", [(1, ()), (2, ("parallel.tp=2", "parallel.sp=true")), (2, ())])
def test_a_restart_leaves_nothing_behind(world: int, overrides: Any, ranks: Zygote, tmp_path: Path) -> None:
    config = parity.small_config(tmp_path, *overrides)
    assert ranks(world, restarted, config=config) == [(True, True, True, True)] * world


def test_baselines_match_what_they_say(tmp_path: Path) -> None:
    from megatron_refine.estimate.flops import batch_flops, matched_ratio, total_steps

    two_pass = ["update.mini_batch_size=2", "train.steps=30", "refine.start_step=10"]
    refine = parity.small_config(tmp_path, *two_pass)
    assert [refine.mini_batch_at(step, step >= 10) for step in (0, 9, 10)] == [4, 4, 2]
    assert total_steps(refine) == 30
    for match, mini in (("data", 4), ("optimizer_steps", 2), ("compute", 2)):
        config = parity.small_config(tmp_path, *two_pass, "refine.enabled=false", f"train.match={match}")
        assert [config.mini_batch_at(step, False) for step in (0, 9, 10)] == [4, 4, mini]
        ratio = batch_flops(refine, True) / batch_flops(refine, False)
        assert matched_ratio(config) == pytest.approx(ratio) and 1.3 < ratio < 2.5
        assert total_steps(config) == (10 + round(20 * ratio) if match == "compute" else 30)


def test_post_training_counts_the_step_on_answers(tmp_path: Path) -> None:
    from megatron_refine.estimate.flops import batch_flops, matched_ratio, step_flops

    post = ["train.phase=posttrain", "task.paths=[x]", "data.tokenizer=x"]
    refine = parity.small_config(tmp_path, *post)
    assert batch_flops(refine, True) == step_flops(refine).refine + step_flops(refine).ntp
    plain = parity.small_config(tmp_path, *post, "refine.enabled=false", "task.inner_step=false", "train.match=compute")
    assert batch_flops(plain, False) == step_flops(refine).ntp
    assert matched_ratio(plain) == pytest.approx(1 + step_flops(refine).ratio)


def optimizer_steps(config: Config) -> int:
    """On a rank: those of an NTP-only batch."""
    step = make_step(config, torch.float32, optimizer=True)
    return int(step(parity.batch(4 // step.ranks.dp), 0, refine=False)["train/optimizer_steps"])


@pytest.mark.parametrize("match, expected", [("data", 1), ("optimizer_steps", 2)])
def test_a_matched_baseline_makes_as_many_optimizer_steps(
    match: str, expected: int, ranks: Zygote, tmp_path: Path
) -> None:
    settings = ["refine.enabled=false", f"train.match={match}", "update.mini_batch_size=2"]
    assert ranks(1, optimizer_steps, config=parity.small_config(tmp_path, *settings)) == [expected]


def test_a_baseline_of_equal_compute_is_alike_before_refine_begins() -> None:
    from megatron_refine.phases.testtime import TestTime

    words = ["train.phase=testtime", "refine.enabled=false", "train.match=compute", "refine.start_step=30"]
    words += ["task.paths=[a]", "data.tokenizer=t", "optimizer.schedule=constant", "optimizer.warmup_steps=0"]
    config = load("configs/quickstart.yaml", words, FAMILIES)
    passes = [TestTime._passes(SimpleNamespace(config=config), step) for step in range(50)]  # type: ignore[arg-type]
    ratio = matched_ratio(config)
    assert 30 * ratio > 31 and passes[:30] == [1] * 30 and sum(passes[30:]) == int(20 * ratio) > 20
