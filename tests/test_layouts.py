"""A whole REFINE step at every pair of layouts is the step of a single rank.

Positions and rollouts the same; losses, every gradient and every parameter after the optimizer's step to rounding.
Sequences differ in length and one is too short for rollouts, so that ranks and micro-batches hold unequal numbers of
tokens: only global means come out right.
"""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_refine.config import Config
from tests.lanes import short
from tests.parity import batch, full_gradients, full_parameters, relative, small_config
from tests.test_step import make_step
from tests.zygote import Zygote

AXES = {
    "tp2": ["parallel.tp=2"],
    "tp2sp": ["parallel.tp=2", "parallel.sp=true"],
    "cp2": ["parallel.cp=2"],
    "pp2": ["parallel.pp=2"],
    "dp2": ["train.micro_batch_size=1"],
}
NAMES = list(AXES)
PAIRS = [(a, b) for i, a in enumerate(NAMES) for b in NAMES[i + 1 :] if (a, b) != ("tp2", "tp2sp")]
LAYOUTS = {a: (2, AXES[a]) for a in NAMES} | {f"{a} {b}": (4, AXES[a] + AXES[b]) for a, b in PAIRS}
# Adam's first step is about lr * sign(gradient) above eps: a large eps keeps rounding noise from deciding signs
SETTINGS = ["optimizer.eps=1e-2", "optimizer.clip_grad=1000.0", "refine.rollout_temperature=0.8"]
BANNED = tuple(range(0, 97, 3))  # ids that no rollout draws
KEYS = ("train/loss", "train/ntp_loss", "train/nsp_loss", "train/grad_norm", "train/ratio_mean", "rollout/reward_mean",
        "rollout/entropy_mean", "rollout/logprob_gap_max")  # fmt: skip


def steps(config: Config) -> dict[str, Any]:
    """On a rank: a step of each kind that the layout allows; this rank's samples with their positions and rollouts."""
    found: dict[str, Any] = {}
    modes = ["two_pass", "fused"] if config.parallel.pp == 1 else ["two_pass"]
    for mode in modes:
        update = config.update.model_copy(update={"mode": mode})
        step = make_step(config.model_copy(update={"update": update}), torch.float32, optimizer=True)
        step.banned = BANNED
        ranks, whole = step.ranks, batch(4)
        whole.lengths[:] = torch.tensor([192, 185, 150, 10])  # 10: too short for rollouts
        share = 4 // ranks.dp
        metrics = step(whole.rows(slice(ranks.dp_rank * share, (ranks.dp_rank + 1) * share)), 0, refine=True)
        e = step.last.experience  # of the first micro-batch
        assert not torch.isin(e.tokens, torch.tensor(BANNED)).any()
        samples = whole.sample_ids[ranks.dp_rank * share :][: len(e.tokens)].tolist()
        drawn = dict(zip(samples, zip(e.positions, e.tokens, strict=True), strict=True))
        found[mode] = metrics, drawn, full_gradients(step.model), full_parameters(step.model)
    return found


@pytest.fixture(scope="module")
def reference(ranks: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    @functools.cache
    def compute(model: str) -> Any:
        return ranks(1, steps, config=small_config(tmp_path_factory.mktemp("reference"), *SETTINGS, model=model))[0]

    return compute


FAMILIES = ("delta_net", "gated_delta_net", "lact", "qwen3_5")
SHORT = [("delta_net", a) for a in NAMES if a != "tp2"] + [("gated_delta_net", "cp2"), ("lact", "tp2sp")]
SHORT += [("qwen3_5", "tp2sp"), ("delta_net", "tp2sp pp2"), ("delta_net", "cp2 dp2")]


@pytest.mark.parametrize(("model", "layout"), short(itertools.product(FAMILIES, LAYOUTS), lambda *case: case in SHORT))
def test_a_step_is_the_same_at_every_layout(
    ranks: Zygote, reference: Callable[[str], Any], tmp_path: Path, model: str, layout: str
) -> None:
    world, overrides = LAYOUTS[layout]
    config = small_config(tmp_path, *SETTINGS, *overrides, model=model)
    compare(ranks(world, steps, config=config), reference(model))


@pytest.mark.parametrize(
    ("model", "overrides"),
    [
        ("delta_net", ["model.num_layers=3"]),
        ("qwen3_5", ["model.num_layers=3", "model.layer_types=[linear_attention,full_attention,linear_attention]"]),
    ],
)
def test_stages_hold_different_numbers_of_layers(
    ranks: Zygote, tmp_path: Path, model: str, overrides: list[str]
) -> None:
    """Where all layers are alike, and where each has its own."""
    own = [*SETTINGS, *overrides]
    expected = ranks(1, steps, config=small_config(tmp_path, *own, model=model))[0]
    staged = small_config(tmp_path, *own, "parallel.pp=2", "parallel.stages=[2,1]", model=model)
    compare(ranks(2, steps, config=staged), expected)


def test_more_branch_rows_than_main_rows(ranks: Zygote, tmp_path: Path) -> None:
    """One context parallel rank has the whole main stream, the other nothing but branch rows."""
    many = [*SETTINGS, "refine.num_rollouts=16"]
    expected = ranks(1, steps, config=small_config(tmp_path, *many))[0]
    compare(ranks(2, steps, config=small_config(tmp_path, *many, "parallel.cp=2")), expected)


def odd_steps(config: Config) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """On a rank: a REFINE step and one on next tokens alone, of 191 main rows and 15 branch rows; the weights then."""
    step = make_step(config, torch.float32, optimizer=True)
    whole = batch(4, length=191)
    return [step(whole, 0, refine=True), step(whole, 1, refine=False)], full_parameters(step.model)


@pytest.mark.slow
def test_rows_that_no_layout_divides(ranks: Zygote, tmp_path: Path) -> None:
    """Each pass is padded to the ranks that it is cut over, on its way through the pipeline too."""
    odd = [*SETTINGS, "data.seq_length=191", "refine.num_chunks=3", "refine.num_rollouts=1", "update.mode=two_pass"]
    expected, weights = ranks(1, odd_steps, config=small_config(tmp_path, *odd))[0]
    for axes in (AXES["cp2"] + AXES["pp2"], AXES["tp2sp"] + AXES["pp2"]):
        for found, own in ranks(4, odd_steps, config=small_config(tmp_path, *odd, *axes)):
            for mine, theirs in zip(found, expected, strict=True):
                for key in (key for key in KEYS if key in theirs):
                    assert mine[key] == pytest.approx(theirs[key], rel=2e-5, abs=5e-6), key
            assert max(relative(own, weights).values()) < 1e-5


def compare(results: list[Any], reference: Any) -> None:
    """Each rank's steps with those of a single rank."""
    for result in results:
        for mode, (metrics, drawn, gradients, parameters) in result.items():
            expected, all_drawn, expected_gradients, expected_parameters = reference[mode]
            for sample, (positions, tokens) in drawn.items():
                if sample in all_drawn:  # of the reference's first micro-batch
                    assert positions.equal(all_drawn[sample][0]) and tokens.equal(all_drawn[sample][1]), (mode, sample)
            for key in KEYS:  # fp32 sums in another order
                assert metrics[key] == pytest.approx(expected[key], rel=2e-5, abs=5e-6), (mode, key)
            worst = max(relative(gradients, expected_gradients).items(), key=lambda item: item[1])
            assert worst[1] < 1e-4, (mode, worst)
            worst = max(relative(parameters, expected_parameters).items(), key=lambda item: item[1])
            assert worst[1] < 1e-5, (mode, worst)
