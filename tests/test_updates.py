"""An optimizer step on packed REFINE rows is the same at every layout: losses, every gradient, every parameter.

Sequences differ in length and one is too short for rollouts, so that ranks and micro-batches hold unequal numbers of
tokens: only global means come out right.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_refine.config import Config
from megatron_refine.kernels.places import Places
from megatron_refine.records import Batch
from tests.lanes import short
from tests.parity import batch, build, experience, full_gradients, full_parameters, relative, small_config

OVERLAP = ["train.overlap=true", "train.bucket_millions=0.002"]  # 2,000 parameters a bucket
LAYOUTS = {
    "tp2": (2, ["parallel.tp=2"]),
    "tp2 sp": (2, ["parallel.tp=2", "parallel.sp=true"]),
    "cp2": (2, ["parallel.cp=2"]),
    "pp2": (2, ["parallel.pp=2"]),
    "dp2": (2, ["train.micro_batch_size=1"]),
    "dp2 overlap": (2, ["train.micro_batch_size=1", *OVERLAP]),
    "cp2 overlap": (2, ["parallel.cp=2", *OVERLAP]),
    "tp2 sp dp2 overlap": (4, ["parallel.tp=2", "parallel.sp=true", *OVERLAP]),
    "pp2 dp2 overlap": (4, ["parallel.pp=2", "train.micro_batch_size=1", *OVERLAP]),
    "tp2 sp dp2": (4, ["parallel.tp=2", "parallel.sp=true"]),
    "tp2 sp pp2": (4, ["parallel.tp=2", "parallel.sp=true", "parallel.pp=2"]),
}
SHORT = ("tp2 sp", "cp2", "pp2", "dp2", "dp2 overlap")
# Adam's first step is about lr * sign(gradient) above eps: a large eps keeps rounding noise from deciding signs
SETTINGS = ["optimizer.eps=1e-2", "optimizer.clip_grad=1000.0", "refine.rollout_temperature=1.3"]


def four_sequences() -> Batch:
    b = batch(4)
    return Batch(b.tokens, torch.tensor([192, 185, 150, 10]), b.sample_ids)  # 10: too short for rollouts


def update(config: Config) -> dict[str, Any]:
    """On a rank: one packed update, and one NTP-only update."""
    from megatron_refine.step.refine import RefineStep
    from megatron_refine.trainer.optimizer import Updater

    results: dict[str, Any] = {}
    for kind in ("refine", "ntp"):
        model, ranks = build(config, torch.float32)
        updater = Updater(config, model, ranks)
        step = RefineStep(config, model, None, updater, ranks)  # type: ignore[arg-type]
        b, e = four_sequences(), experience(4, torch.float32)
        size = config.train.micro_batch_size
        mine = [
            slice(i, i + size) for i in range(ranks.dp_rank * 4 // ranks.dp, (ranks.dp_rank + 1) * 4 // ranks.dp, size)
        ]
        micros, own = [b.rows(i) for i in mine], [e.rows(i) for i in mine]
        records = [SimpleNamespace(experience=x, places=Places.of_each(x.positions)) for x in own]
        if kind == "refine":
            result = step._update(step._items(micros, 0, True, records), step._packed)  # type: ignore[arg-type]
        else:
            result = step._update(step._items(micros, 0, False, []), step._main)
        gradients = full_gradients(model)
        results[kind] = result.sums, result.grad_norm, gradients, full_parameters(model)
    return results


@pytest.fixture(scope="module")
def reference(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return ranks(1, update, config=small_config(tmp_path_factory.mktemp("reference"), *SETTINGS))[0]


@pytest.mark.parametrize("layout", short(LAYOUTS, lambda layout: layout in SHORT))
def test_an_update_is_the_same_at_every_layout(ranks: Any, reference: Any, tmp_path: Path, layout: str) -> None:
    world, overrides = LAYOUTS[layout]
    config = small_config(tmp_path, *SETTINGS, *overrides)
    for result in ranks(world, update, config=config):
        for kind, (sums, norm, gradients, parameters) in result.items():
            expected = reference[kind]
            torch.testing.assert_close(sums, expected[0], rtol=2e-6, atol=1e-7)  # fp32 sums in another order
            assert norm == pytest.approx(expected[1], rel=2e-5)
            worst = max(relative(gradients, expected[2]).items(), key=lambda item: item[1])
            assert worst[1] < 1e-4, (kind, worst)
            worst = max(relative(parameters, expected[3]).items(), key=lambda item: item[1])
            assert worst[1] < 1e-5, (kind, worst)


def clipped(config: Config) -> tuple[float, float, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """On a rank, after two clipped steps: the gradient's norm, the reported one, weights by torch's AdamW on whole
    tensors, and by the optimizer."""
    from megatron_refine.step.refine import RefineStep
    from megatron_refine.trainer.optimizer import Updater
    from tests.test_step import GradientsOnly

    found, o = [], config.optimizer
    model, ranks = build(config, torch.float32)
    updater, b = Updater(config, model, ranks), four_sequences()
    real = RefineStep(config, model, None, updater, ranks)  # type: ignore[arg-type]
    plain = RefineStep(config, model, None, GradientsOnly(model, ranks), ranks)  # type: ignore[arg-type]
    weights = {name: p.clone().requires_grad_() for name, p in full_parameters(model).items()}
    vectors = [p for p in weights.values() if p.dim() == 1]
    matrices = [p for p in weights.values() if p.dim() > 1]
    groups = [{"params": matrices, "weight_decay": o.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, betas=(o.beta1, o.beta2), eps=o.eps)
    for i in range(2):
        plain(b, i, refine=False)
        gradients = full_gradients(model)
        for name, p in weights.items():
            p.grad = gradients[name].clone()
        norm = float(torch.nn.utils.clip_grad_norm_(weights.values(), o.clip_grad))
        for group in adam.param_groups:
            group["lr"] = updater.lr
        adam.step()
        found.append((norm, real(b, i, refine=False)["train/grad_norm"]))
        assert found[-1][0] > 3 * o.clip_grad
    return *found[-1], {n: p.detach() for n, p in weights.items()}, full_parameters(model)


@pytest.mark.parametrize("layout", ["tp2 sp", "pp2"])
def test_a_clipped_step_is_adamws(ranks: Any, tmp_path: Path, layout: str) -> None:
    """With an eps above the clipped gradient, so that its length decides the step; the norm is that of all ranks."""
    world, overrides = LAYOUTS[layout]
    settings = ["optimizer.eps=1e-2", "optimizer.clip_grad=0.1", "optimizer.weight_decay=0.3", "optimizer.beta2=0.8"]
    config = small_config(tmp_path, *settings, *overrides)
    for norm, reported, expected, found in ranks(world, clipped, config=config):
        assert reported == pytest.approx(norm, rel=2e-5)
        assert max(relative(found, expected).values()) < 1e-6  # fp32; a step that is not clipped moves them by 1e-2


def buckets(config: Config) -> list[int]:
    model, _ = build(config, torch.float32)
    return [len(buffer.buckets) for buffer in model.buffers]


@pytest.mark.parametrize(("overrides", "least"), [([], 1), (OVERLAP, 9)])
def test_the_gradient_is_reduced_in_buckets(ranks: Any, tmp_path: Path, overrides: list[str], least: int) -> None:
    """Their size is the configuration's where reducing overlaps, which it does not by itself on a CPU."""
    found = ranks(2, buckets, config=small_config(tmp_path, "train.micro_batch_size=1", *overrides))[0]
    assert len(found) == 1 and (found[0] >= least if overrides else found[0] == 1)


def test_losses_are_global_means(ranks: Any, reference: Any, tmp_path: Path) -> None:
    """The reported loss is the mean over all real targets, computed here by hand from one forward."""
    ntp = reference["ntp"][0][0]
    by_hand = ranks(1, mean_loss, config=small_config(tmp_path))[0]
    assert ntp == pytest.approx(by_hand, rel=1e-6)
    assert reference["refine"][0][0] == pytest.approx(by_hand, rel=1e-6)


def mean_loss(config: Config) -> float:
    from megatron_refine.trainer import forward

    model, _ = build(config, torch.float32)
    b = four_sequences()
    logprobs = forward.main_pass(model, b.tokens).scores.logprobs
    real = [logprobs[i, : int(n) - 1] for i, n in enumerate(b.lengths)]
    return -float(torch.cat(real).mean())
