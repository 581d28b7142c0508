"""The whole step: rollouts of the native engine, fused against two-pass, mini-batches, what an NTP-only step costs."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_refine.config import Config
from megatron_refine.records import Batch
from tests.lanes import short
from tests.parity import batch, build, full_gradients, relative, small_config

LAYOUTS = {"tp1": (1, []), "tp2": (2, ["parallel.tp=2"]), "tp2 sp": (2, ["parallel.tp=2", "parallel.sp=true"])}


class GradientsOnly:
    """An updater that leaves the gradient in the model (Megatron's optimizer has no fp64)."""

    lr = 0.0

    def __init__(self, model: Any, ranks: Any):
        self.model, self.ranks = model, ranks

    def update(self, items: Any, forward: Any, loss: Any, num_rows: int, num_sums: int) -> Any:
        from megatron_refine.trainer.gradients import accumulate
        from megatron_refine.trainer.optimizer import UpdateResult

        sums = accumulate(self.model, items, forward, loss, num_rows, num_sums, self.ranks)
        return UpdateResult(sums.tolist(), 1.0, False)

    def advance_schedule(self) -> None:
        """There is none."""


def make_step(config: Config, dtype: torch.dtype, optimizer: bool = False) -> Any:
    from megatron_refine.engine.native import NativeEngine
    from megatron_refine.step.refine import RefineStep
    from megatron_refine.trainer.optimizer import Updater

    model, ranks = build(config, dtype)
    updater = Updater(config, model, ranks) if optimizer else GradientsOnly(model, ranks)
    return RefineStep(config, model, NativeEngine(model), updater, ranks)  # type: ignore[arg-type]


def gradients_of_a_step(config: Config) -> Any:
    step = make_step(config, torch.float64)
    metrics = step(batch(4), 0, refine=True)
    records = step.last.experience
    return metrics, full_gradients(step.model), records.positions, records.tokens


@pytest.mark.parametrize(
    ("recompute", "layout"),
    short(
        itertools.product(("none", "selective", "full"), ("tp1", "tp2 sp")),
        lambda recompute, layout: (recompute == "selective") == (layout == "tp1"),
    ),
)
def test_fused_and_two_pass_give_the_same_gradients(ranks: Any, tmp_path: Path, layout: str, recompute: str) -> None:
    world, overrides = LAYOUTS[layout]
    found = {}
    for mode in ("fused", "two_pass"):
        config = small_config(tmp_path, f"update.mode={mode}", f"train.recompute={recompute}", *overrides)
        found[mode] = ranks(world, gradients_of_a_step, config=config)[0]
    (fused, gradients, positions, tokens), (two_pass, expected, *drawn) = found["fused"], found["two_pass"]
    assert positions.equal(drawn[0]) and tokens.equal(drawn[1])
    assert max(relative(gradients, expected).values()) < 1e-10  # fp64: the same products in another order
    for key in ("train/ntp_loss", "train/nsp_loss", "rollout/reward_mean", "train/ratio_mean"):
        assert fused[key] == pytest.approx(two_pass[key], rel=1e-10, abs=1e-12), key
    assert fused["train/clip_fraction"] == 0 and fused["train/ratio_mean"] == pytest.approx(1)


def rollouts(config: Config, temperature: float) -> Any:
    """On a rank: positions, tokens, the engine's and the trainer's log-probabilities, and greedy continuations."""
    from megatron_refine.trainer import forward

    step = make_step(config, torch.float32)
    b = batch(4)
    with torch.no_grad():
        explored, _ = step.explore(b, 3, keep_graph=False, temperature=temperature)
        e, greedy = explored.experience, []
        for i, j in torch.cartesian_prod(torch.arange(4), torch.arange(4)).tolist():
            text = b.tokens[i, : int(e.positions[i, j])]
            for _ in range(5):  # the slow way: a full forward a token
                rows = forward._rows(step.model, text[None], forward.Branches(main_len=len(text)))
                logits = forward.unwrap(step.model).logits(rows.local[len(text) - 1])
                text = torch.cat([text, _argmax(logits, step.ranks)])
            greedy.append(text[-5:])
    return e.positions, e.tokens, explored.gap, torch.stack(greedy).view(4, 4, 5)


def _argmax(logits: torch.Tensor, ranks: Any) -> torch.Tensor:
    import torch.distributed as dist

    parts = [torch.empty_like(logits) for _ in range(ranks.tp)]
    dist.all_gather(parts, logits, group=ranks.tp_group)
    return torch.cat(parts, -1).argmax(-1)


@pytest.mark.parametrize("layout", short(LAYOUTS, lambda layout: layout != "tp2"))
def test_native_rollouts_agree_with_the_trainer(ranks: Any, tmp_path: Path, layout: str) -> None:
    world, overrides = LAYOUTS[layout]
    config = small_config(tmp_path, *overrides)
    for _, tokens, gap, greedy in ranks(world, rollouts, config=config, temperature=0.0):
        assert tokens[:, :, 0].equal(greedy) and tokens[:, :, 1].equal(greedy)
        assert gap.max() < 1e-5  # fp32 log-probabilities of size 5, summed in another order
    for temperature in (1.0, 0.5):
        for _, _, gap, _ in ranks(world, rollouts, config=config, temperature=temperature):
            assert gap.max() < 1e-5 / temperature


def test_rollouts_are_the_same_at_every_layout(ranks: Any, tmp_path: Path) -> None:
    one = ranks(1, rollouts, config=small_config(tmp_path), temperature=1.0)[0]
    assert len(one[1][0, 0].unique(dim=0)) == 2  # the rollouts of a position differ
    for layout in ("tp2", "tp2 sp"):
        world, overrides = LAYOUTS[layout]
        for positions, tokens, *_ in ranks(world, rollouts, config=small_config(tmp_path, *overrides), temperature=1.0):
            assert positions.equal(one[0]) and tokens.equal(one[1])


def what_is_drawn(config: Config) -> Any:
    """On a rank: of the same sequences at two steps, the numbers that select and draw; positions and tokens."""
    from megatron_refine.engine.native import NativeEngine
    from megatron_refine.step import refine

    step, found = make_step(config, torch.float32), []
    decode, select = NativeEngine._decode, refine.select_positions

    def decoded(self: Any, fork: Any, draws: torch.Tensor, *how: Any) -> Any:
        found[-1]["draws"] = draws
        return decode(self, fork, draws, *how)

    def selected(entropy: torch.Tensor, lengths: torch.Tensor, uniform: torch.Tensor, **rest: Any) -> torch.Tensor:
        found[-1]["uniform"] = uniform
        return select(entropy, lengths, uniform, **rest)

    NativeEngine._decode, refine.select_positions = decoded, selected  # type: ignore[method-assign, assignment]
    for number in (3, 4):
        found.append({})
        with torch.no_grad():
            e = step.explore(batch(4, seed=1), number, keep_graph=False)[0].experience
        found[-1] |= {"positions": e.positions, "tokens": e.tokens}
    return found


def test_every_draw_is_a_function_of_its_place_in_the_run(ranks: Any, tmp_path: Path) -> None:
    """Pinned: of seed, stream, step, sample and chunk; of seed, stream, step, sample, position, rollout and token.

    The rollouts of a sequence are counted over all of its chunks: two may start at one position.
    """
    from megatron_refine.trainer.random import uniform

    overrides = ["run.seed=5", "refine.selection=argmax", "refine.margin=90"]  # 90 .. 102: positions coincide
    first, second = ranks(1, what_is_drawn, config=small_config(tmp_path, *overrides))[0]
    for step, found in ((3, first), (4, second)):
        draws, positions = found["draws"].view(5, 4, 4, 2), found["positions"]
        for b, j in torch.cartesian_prod(torch.arange(4), torch.arange(4)).tolist():
            assert found["uniform"][b, j] == uniform(5, 0, step, 100 + b, j)
            for r, t in ((0, 0), (1, 0), (1, 4)):
                assert draws[t, b, j, r] == uniform(5, 1, step, 100 + b, int(positions[b, j]), 2 * j + r, t)
    assert first["positions"].equal(second["positions"])  # by argmax
    assert not first["tokens"].equal(second["tokens"])
    assert int(first["positions"][0, 0]) == int(first["positions"][0, 1])
    assert not first["tokens"][0, 0].equal(first["tokens"][0, 1])


def count_passes(config: Config) -> dict[str, list[int]]:
    """On a rank: (forward, backward) passes of the model in a step of each kind."""
    from megatron_refine.trainer.model import unwrap

    step = make_step(config, torch.float32, optimizer=True)
    layer, counts = unwrap(step.model).decoder.layers[0], [0, 0]
    layer.register_forward_hook(lambda *_: counts.__setitem__(0, counts[0] + 1))
    layer.register_full_backward_hook(lambda *_: counts.__setitem__(1, counts[1] + 1))
    found = {}
    for kind, refine in (("ntp", False), ("refine", True)):
        counts[:] = 0, 0
        metrics = step(batch(4), 0, refine)
        found[kind] = [*counts, metrics["train/optimizer_steps"]]
    return found


def test_passes_of_a_step(ranks: Any, tmp_path: Path) -> None:
    """Two micro-batches: NTP is one forward and backward each. k = 5 tokens decode in four passes."""
    fused = ranks(1, count_passes, config=small_config(tmp_path, "update.mode=fused"))[0]
    assert fused["ntp"] == [2, 2, 1]
    assert fused["refine"] == [2 * (1 + 4 + 1), 2 * 2, 1]  # main, decoding, branches; backward of main and branches
    two_pass = ranks(1, count_passes, config=small_config(tmp_path, "update.mode=two_pass"))[0]
    assert two_pass["ntp"] == [2, 2, 1]
    assert two_pass["refine"] == [2 * (1 + 4 + 1 + 1), 2, 1]


def first_loss(config: Config) -> list[dict[str, float]]:
    from megatron_refine.engine.native import NativeEngine
    from megatron_refine.step.refine import RefineStep
    from megatron_refine.trainer.model import build_model
    from megatron_refine.trainer.optimizer import Updater
    from megatron_refine.trainer.parallel import init_parallel

    ranks = init_parallel(config)
    model = build_model(config, ranks)
    step = RefineStep(config, model, NativeEngine(model), Updater(config, model, ranks), ranks)
    return [step(batch(4, seed=i), i, refine=True) for i in range(3)]


@pytest.mark.parametrize("layout", ["tp1", "tp2 sp", "pp2"])
def test_bf16_follows_fp32(ranks: Any, tmp_path: Path, layout: str) -> None:
    world, overrides = (LAYOUTS | {"pp2": (2, ["parallel.pp=2"])})[layout]
    low = ranks(world, first_loss, config=small_config(tmp_path, "train.precision=bf16", *overrides))[0]
    full = ranks(world, first_loss, config=small_config(tmp_path, *overrides))[0]
    for a, b in zip(low, full, strict=True):
        assert a["train/ntp_loss"] == pytest.approx(b["train/ntp_loss"], rel=1e-2)  # bf16 has 3 significant digits
        assert a["rollout/logprob_gap_max"] < 0.2  # decoding and rescoring round differently


def two_mini_batches(config: Config) -> Any:
    """On a rank, without a change of the weights: a step of two mini-batches, and a step on each alone."""
    from megatron_refine.trainer.optimizer import UpdateResult

    def run(config: Config, rows: slice) -> Any:
        step, gradients = make_step(config, torch.float64), []
        update = step.updater.update

        def recorded(*args: Any) -> UpdateResult:
            found = update(*args)
            gradients.append(full_gradients(step.model))
            return UpdateResult(found.sums, 1.0 + 2 * len(gradients), len(gradients) == 3)  # a norm of its own

        step.updater.update, advanced = recorded, []
        step.updater.advance_schedule = lambda: advanced.append(1)
        metrics = step(batch(4).rows(rows), 3, refine=True)
        assert advanced == [1]  # once a batch, however many optimizer steps it took
        return metrics, gradients, step.last, step.engine.weight_version

    alone = config.model_copy(update={"train": config.train.model_copy(update={"global_batch_size": 2})})
    return run(config, slice(0, 4)), run(alone, slice(0, 2)), run(alone, slice(2, 4))


def test_metrics_of_a_step_are_means_over_its_mini_batches(ranks: Any, tmp_path: Path) -> None:
    """Losses and norms over updates, rewards and gaps over rollouts, entropies over tokens."""
    settings = ["update.mini_batch_size=2", "refine.ntp_coef=0.6", "refine.rollout_temperature=0.9"]
    whole, *halves = ranks(1, two_mini_batches, config=small_config(tmp_path, *settings))[0]
    metrics, gradients, last, version = whole
    assert version == metrics["rollout/weight_version"] == 3 and metrics["train/optimizer_steps"] == 2
    assert metrics["train/grad_norm"] == 4.0  # of 3 and 5
    assert last.experience.tokens.equal(halves[0][2].experience.tokens)  # the first micro-batch
    (first, second), exact = (half[0] for half in halves), {"rel": 1e-10}
    for i, half in enumerate(halves):
        assert max(relative(gradients[i], half[1][0]).values()) < 1e-10
    for key in ("train/ntp_loss", "train/nsp_loss", "rollout/reward_mean", "rollout/logprob_gap_mean"):
        assert metrics[key] == pytest.approx((first[key] + second[key]) / 2, **exact), key
    assert metrics["train/loss"] == pytest.approx(0.6 * metrics["train/ntp_loss"] + 0.7 * metrics["train/nsp_loss"])
    assert metrics["rollout/logprob_gap_max"] == max(x["rollout/logprob_gap_max"] for x in (first, second))
    entropies = [half[2].entropy[i, :n] for half, i, n in ((halves[0], 0, 192), (halves[0], 1, 185),
                                                           (halves[1], 0, 178), (halves[1], 1, 171))]  # fmt: skip
    assert metrics["rollout/entropy_mean"] == pytest.approx(float(torch.cat(entropies).mean()), **exact)
    rewards = torch.cat([half[2].rewards for half in halves])
    assert metrics["rollout/reward_std"] == pytest.approx(float(rewards.double().std(correction=0)))


def of_sequences(config: Config) -> Any:
    """On a rank: a step whose policy loss is a mean over tokens, and over rollouts; and its rollouts' rewards."""
    found = []
    for mean in ("token", "sequence"):
        own = config.model_copy(update={"refine": config.refine.model_copy(update={"loss_mean": mean})})
        step = make_step(own, torch.float64)
        metrics = step(batch(4), 3, refine=True)
        found.append((metrics, full_gradients(step.model), step.last))
    return found


def test_a_mean_over_rollouts_is_k_times_that_over_tokens(ranks: Any, tmp_path: Path) -> None:
    """And rewards of all kinds are reported, whichever is configured."""
    settings = ["refine.ntp_coef=0", "refine.nsp_coef=1", "refine.reward=hybrid", "train.micro_batch_size=4"]
    token, sequence = ranks(1, of_sequences, config=small_config(tmp_path, *settings))[0]
    assert sequence[0]["train/nsp_loss"] == pytest.approx(5 * token[0]["train/nsp_loss"], rel=1e-12)
    assert max(relative(sequence[1], {n: 5 * g for n, g in token[1].items()}).values()) < 1e-12
    metrics, rewards, kinds = token[0], token[2].rewards, token[2].kinds
    assert kinds.sum(-1).allclose(rewards)
    tokens, truth = token[2].experience.tokens, token[2].truth
    matches = (tokens == truth[:, :, None]).double().mean(-1)
    assert kinds[..., 1].double().allclose(matches)
    assert metrics["rollout/binary_mean"] == pytest.approx(float(matches.mean()))
    assert metrics["rollout/hybrid_mean"] == pytest.approx(metrics["rollout/reward_mean"])
    assert metrics["rollout/cosine_mean"] == pytest.approx(float(kinds[..., 0].mean()))


def mini_batch_steps(config: Config) -> Any:
    from megatron_refine.data.order import rank_samples

    step = make_step(config, torch.float32, optimizer=True)
    mine = torch.from_numpy(rank_samples(0, 4, config.mini_batch_size, step.ranks.dp_rank, step.ranks.dp))
    first, second = (Batch(*(field[mine] for field in vars(batch(4, seed=i)).values())) for i in range(2))
    return step(first, 0, refine=True), step(second, 1, refine=False)


def test_mini_batches_learn_from_fixed_old_logprobs(ranks: Any, tmp_path: Path) -> None:
    # a large eps keeps rounding noise from deciding the sign of an Adam step
    settings = ["update.mini_batch_size=2", "optimizer.eps=1e-2", "optimizer.lr=3e-2"]
    config = small_config(tmp_path, *settings)
    assert not config.fused
    refine, ntp = ranks(1, mini_batch_steps, config=config)[0]
    assert refine["train/optimizer_steps"] == 2 and ntp["train/optimizer_steps"] == 1
    assert refine["train/ratio_mean"] != pytest.approx(1, abs=1e-4)  # the second mini-batch is off-policy
    two_ranks = ranks(2, mini_batch_steps, config=small_config(tmp_path, *settings, "train.micro_batch_size=1"))[0][0]
    for key in ("train/ntp_loss", "train/nsp_loss", "rollout/reward_mean"):
        assert two_ranks[key] == pytest.approx(refine[key], rel=1e-4, abs=1e-6), key  # fp32 through an Adam step


def poisoned(config: Config) -> Any:
    """On a rank: steps with a NaN weight."""
    from megatron_refine.errors import NonFiniteError
    from megatron_refine.trainer.model import unwrap

    step = make_step(config, torch.float32, optimizer=True)
    step(batch(4), 0, refine=True)
    weight = unwrap(step.model).decoder.layers[0].mlp.linear_fc2.weight
    before = {n: p.detach().clone() for n, p in unwrap(step.model).named_parameters()}
    good = weight[0, 0].clone()
    weight.data[0, 0] = float("nan")
    skipped = step(batch(4, seed=1), 1, refine=True)["train/optimizer_steps"]
    weight.data[0, 0] = good
    loss, step._loss = step._loss, lambda *given: (loss(*given)[0], loss(*given)[1] + torch.inf)
    skipped += step(batch(4, seed=1), 1, refine=False)["train/optimizer_steps"]  # a finite gradient, not the loss
    step._loss = loss
    same = all(p.equal(before[n]) for n, p in unwrap(step.model).named_parameters())
    assert step(batch(4, seed=1), 1, refine=False)["train/optimizer_steps"] == 1  # they are counted in a row
    weight.data[0, 0] = float("nan")
    try:
        for i in range(5):
            step(batch(4, seed=2), 2 + i, refine=False)
    except NonFiniteError as error:
        return skipped, same, i, str(error)
    return skipped, same, None, ""


def test_non_finite_steps_are_skipped_then_stop_the_run(ranks: Any, tmp_path: Path) -> None:
    config = small_config(tmp_path, "train.max_skipped_steps=2")
    skipped, same, stopped_at, message = ranks(1, poisoned, config=config)[0]
    assert skipped == 0 and same
    assert stopped_at == 2 and "not finite in 3 steps in a row" in message and "checkpoints are intact" in message
