"""The vocabulary-parallel head and its samples against the whole softmax; counter-based random numbers; the clock."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_refine.config import Config
from megatron_refine.platform import hardware
from megatron_refine.trainer import random
from megatron_refine.trainer.clock import Clock
from tests.parity import full_gradients, small_config
from tests.test_step_functions import DRAWS, SIGNIFICANCE, chi_square
from tests.zygote import Zygote

VOCAB, PADDED, HIDDEN, ROWS = 97, 128, 64, 37
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}  # fp64 rounds at 1e-16, sums have a hundred terms
BELOW_ONE = 1 - 2.0**-53  # the highest uniform there is


def rows_and_targets() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden rows with a wide spread of logits, targets on both halves of the vocabulary, weights of the loss."""
    generator = torch.Generator().manual_seed(3)
    rows = 4 * torch.randn(ROWS, HIDDEN, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    targets[:4] = torch.tensor([0, 63, 64, VOCAB - 1])  # first and last of each rank's real ids
    return rows, targets, torch.randn(ROWS, generator=generator, dtype=torch.float64)


def temperatures() -> Tensor:
    return 0.5 + random.uniform(9, torch.arange(ROWS))


def build(config: Config) -> tuple[Any, Any, Tensor]:
    """On a rank: the model in fp64, its RefineModel, the output layer's full weight."""
    from megatron_refine.trainer.model import build_model, unwrap
    from megatron_refine.trainer.parallel import init_parallel

    ranks = init_parallel(config)
    model = build_model(config, ranks, torch.float64)
    weight = unwrap(model).output_layer.weight
    parts = [torch.empty_like(weight) for _ in range(ranks.tp)]
    dist.all_gather(parts, weight.detach(), group=ranks.tp_group)
    return model, unwrap(model), torch.cat(parts)


def scored(config: Config, chunk_rows: int) -> dict[str, Any]:
    """On a rank: `head.score` with `chunk_rows` rows at a time, each at a temperature of its own, and its gradients."""
    from megatron_refine.trainer import head
    from megatron_refine.trainer.gradients import finalize_gradients

    model, inner, weight = build(config)
    head.CHUNK_ELEMENTS = chunk_rows * PADDED // config.parallel.tp
    rows, targets, weights = rows_and_targets()
    rows.requires_grad_()
    scores = head.score(inner, rows, targets, temperatures())
    assert not scores.entropy.requires_grad
    model.zero_grad_buffer()
    (scores.logprobs * weights).sum().backward()
    finalize_gradients([model])
    assert rows.grad is not None
    dist.all_reduce(rows.grad, group=inner.pg_collection.tp)  # partial over tp: the model sums where it hands out rows
    return {
        "logprobs": scores.logprobs.detach(), "entropy": scores.entropy, "correct": scores.correct, "weight": weight,
        "rows_grad": rows.grad, "weight_grad": full_gradients(model)["output_layer.weight"],
    }  # fmt: skip


@pytest.mark.parametrize("chunk_rows", [ROWS, 5, 1])
@pytest.mark.parametrize("tp", [1, 2])
def test_scores_equal_the_whole_softmax(tp: int, chunk_rows: int, ranks: Zygote, tmp_path: Path) -> None:
    config = small_config(tmp_path, f"parallel.tp={tp}")
    rows, targets, weights = rows_and_targets()
    for found in ranks(tp, scored, config=config, chunk_rows=chunk_rows):
        rows, weight = rows.detach().requires_grad_(), found["weight"].requires_grad_()
        logits = rows @ weight[:VOCAB].mT / temperatures()[:, None]
        logprobs = logits.log_softmax(-1)
        truth = logprobs.gather(1, targets[:, None])[:, 0]
        (truth * weights).sum().backward()
        torch.testing.assert_close(found["logprobs"], truth, **EXACT)
        torch.testing.assert_close(found["entropy"], -(logprobs.exp() * logprobs).sum(-1), **EXACT)
        assert torch.equal(found["correct"], logits.argmax(-1) == targets) and weight.shape == (PADDED, HIDDEN)
        torch.testing.assert_close(found["rows_grad"], rows.grad, **EXACT)
        torch.testing.assert_close(found["weight_grad"], weight.grad, **EXACT)
        assert not found["weight_grad"][VOCAB:].any()  # exactly: the padding has probability 0


def correct_targets(config: Config) -> list[bool]:
    """On a rank: `correct` when each target is the id with the highest logit, and when it is the next one."""
    from megatron_refine.trainer import head

    _, inner, weight = build(config)
    rows = rows_and_targets()[0]
    best = (rows @ weight[:VOCAB].mT).argmax(-1)
    return [*head.score(inner, rows, best).correct, *head.score(inner, rows, (best + 1) % VOCAB).correct]


@pytest.mark.parametrize("tp", [1, 2])
def test_correct_is_the_hit_of_the_argmax(tp: int, ranks: Zygote, tmp_path: Path) -> None:
    config = small_config(tmp_path, f"parallel.tp={tp}")
    assert ranks(tp, correct_targets, config=config) == [[True] * ROWS + [False] * ROWS] * tp


def drawn(config: Config, temperature: float) -> dict[str, Tensor]:
    """On a rank: many draws after one row, one draw after each of many, and draws at both ends of [0, 1)."""
    from megatron_refine.trainer.head import sample

    _, inner, weight = build(config)
    rows = rows_and_targets()[0]
    tokens, logprobs = sample(inner, rows[:1].expand(DRAWS, -1), random.uniform(5, torch.arange(DRAWS)), temperature)
    spread = sample(inner, rows, random.uniform(6, torch.arange(ROWS)), temperature)[0]
    ends = [sample(inner, rows, torch.full((ROWS,), u, dtype=torch.float64), temperature)[0] for u in (0.0, BELOW_ONE)]
    return {"tokens": tokens, "logprobs": logprobs, "spread": spread, "ends": torch.stack(ends), "weight": weight}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_draws_follow_the_softmax_at_any_layout(temperature: float, ranks: Zygote, tmp_path: Path) -> None:
    results = []
    for tp in (1, 2):
        results += ranks(tp, drawn, config=small_config(tmp_path, f"parallel.tp={tp}"), temperature=temperature)
    first, rows = results[0], rows_and_targets()[0]
    logits = rows @ first["weight"][:VOCAB].mT
    counts = torch.bincount(first["tokens"], minlength=VOCAB)
    assert len(counts) == VOCAB  # no id of the padding
    assert chi_square(counts, DRAWS * (logits[0] / temperature).softmax(-1)) > SIGNIFICANCE
    scaled = logits[:1] / temperature
    truth = scaled.log_softmax(-1).expand(DRAWS, -1).gather(1, first["tokens"][:, None])[:, 0]
    cumulative = (logits / temperature).softmax(-1).cumsum(-1)
    uniforms = random.uniform(6, torch.arange(ROWS))
    assert torch.equal(first["spread"], (cumulative <= uniforms[:, None]).sum(-1))
    for other in results:
        torch.testing.assert_close(other["logprobs"], truth, **EXACT)  # at that of the draw
        for name in ("tokens", "spread", "ends"):
            assert torch.equal(other[name], first[name])
    assert first["ends"].tolist() == [[0] * ROWS, [VOCAB - 1] * ROWS]


def banned(config: Config, ids: tuple[int, ...], temperature: float) -> Any:
    """On a rank: draws that never take some ids."""
    from megatron_refine.trainer.head import sample

    _, inner, weight = build(config)
    rows = rows_and_targets()[0]
    uniforms = random.uniform(6, torch.arange(ROWS))
    return *sample(inner, rows, uniforms, temperature, banned=ids), weight


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
def test_banned_ids_are_not_drawn_and_count_in_log_probabilities(
    temperature: float, ranks: Zygote, tmp_path: Path
) -> None:
    """By the whole softmax, the banned ids taken out of what is drawn from: the likeliest ones are among them."""
    for tp in (1, 2):
        config, rows = small_config(tmp_path, f"parallel.tp={tp}"), rows_and_targets()[0]
        (_, _, weight), *_ = ranks(tp, banned, config=config, ids=(), temperature=1.0)
        logits = (rows @ weight[:VOCAB].mT) / (temperature or 1.0)
        ids = tuple(logits.argmax(-1)[:6].unique().tolist()) + (0, VOCAB - 1)
        open_ones = logits.index_fill(1, torch.tensor(ids), -torch.inf)
        cumulative = open_ones.softmax(-1).cumsum(-1)
        wanted = (cumulative <= random.uniform(6, torch.arange(ROWS))[:, None]).sum(-1)
        wanted = wanted if temperature else open_ones.argmax(-1)
        for tokens, logprobs, _ in ranks(tp, banned, config=config, ids=ids, temperature=temperature):
            assert tokens.equal(wanted) and not set(tokens.tolist()) & set(ids)
            expected = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
            torch.testing.assert_close(logprobs, expected, **EXACT)


def extremes(config: Config) -> dict[str, list[list[int]]]:
    """On a rank: samples where logits tie, and where most ids have probability 0.

    Row e_i of `torch.eye` reads column i of the weight as its logits.
    """
    from megatron_refine.trainer.head import sample
    from megatron_refine.trainer.shards import shard

    _, inner, weight = build(config)
    weight = torch.zeros_like(weight)
    for column, ids in enumerate([(10, 70), (3, 5), (75, 70), (96,), (0,), (63, 64)]):
        weight[list(ids), column] = 50.0
    weight[:VOCAB, 6] = -1e4  # far below the padding rows' own products
    weight[:, 7:12] = -1e5  # all but some ids: probability 0 in fp64
    for column, ids in enumerate([(0, 40), (40,), (64, 65), (90,), (30, 80)], start=7):
        weight[list(ids), column] = 0.0
    layer = inner.output_layer.weight
    with torch.no_grad():
        layer.copy_(shard(weight, layer, inner.pg_collection.tp.rank(), inner.pg_collection.tp.size()))
    rows, found = torch.eye(HIDDEN, dtype=torch.float64)[:13], {}
    for temperature in (0.0, 1.0, 0.7):
        uniforms = [torch.full((13,), u, dtype=torch.float64) for u in (0.0, 0.5, 0.5 - 2.0**-53, BELOW_ONE)]
        tokens = [sample(inner, rows, u, temperature)[0].tolist() for u in uniforms]
        found[str(temperature)] = [list(column) for column in zip(*tokens, strict=True)]
    return found


@pytest.mark.parametrize("tp", [1, 2])
def test_ties_and_impossible_ids(tp: int, ranks: Zygote, tmp_path: Path) -> None:
    config = small_config(tmp_path, f"parallel.tp={tp}")
    for found in ranks(tp, extremes, config=config):
        greedy = [10, 3, 70, 96, 0, 63, 0, 0, 40, 64, 90, 30, 0]  # the lowest of equal ids; the last row ties them all
        assert found["0.0"] == [[token] * 4 for token in greedy]
        for temperature in ("1.0", "0.7"):
            # two equal ids share [0, 1) in halves, whatever rank holds them; nothing else is ever drawn
            halves = {7: (0, 40), 8: (40, 40), 9: (64, 65), 10: (90, 90), 11: (30, 80)}
            for row, (low, high) in halves.items():
                assert found[temperature][row] == [low, high, low, high]
            for row in (6, 12):
                assert found[temperature][row] == [0, 48, 48, VOCAB - 1]  # uniform over the real ids


def splitmix(bits: int) -> int:
    """The finaliser of splitmix64 in whole numbers."""
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64
    return bits ^ bits >> 31


def test_uniform_is_splitmix64() -> None:
    golden, published = 0x9E3779B97F4A7C15, [6457827717110365317, 3203168211198807973]  # of seed 1234567
    assert [splitmix((1234567 + i * golden) % 2**64) for i in (1, 2)] == published
    for seed, *counters in [(0, 0), (1, 2, 3), (2**62, 2**40, 5, 7), (123, 1, 10**12, 0, 4)]:
        bits = splitmix(seed)
        for counter in counters:
            bits = splitmix(((bits ^ counter) + golden) % 2**64)
        assert float(random.uniform(seed, *counters)) == (bits >> 11) / 2**53


def test_uniform_is_a_pure_function_of_its_counters() -> None:
    a, b = torch.arange(6)[:, None], torch.arange(100, 105)
    grid = random.uniform(7, random.ROLLOUT, a, b)
    assert grid.shape == (6, 5) and grid.dtype == torch.float64
    assert torch.equal(grid, random.uniform(7, random.ROLLOUT, a.expand(6, 5), b.expand(6, 5).contiguous()))
    assert torch.equal(grid[2:4], random.uniform(7, random.ROLLOUT, a[2:4], b))
    assert float(grid[3, 2]) == float(random.uniform(7, random.ROLLOUT, 3, 102))
    others = [random.uniform(8, random.ROLLOUT, a, b), random.uniform(7, random.SELECTION, a, b), grid]
    values = torch.cat([x.flatten() for x in [*others, random.uniform(7, random.ROLLOUT, b, a), grid.new_zeros(0)]])
    assert len(values.unique()) == 120  # another seed, stream, counter or order of counters is another number


@pytest.mark.parametrize("axis", ["counter", "seed", "outer counter"])
def test_uniform_is_uniform_and_uncorrelated(axis: str) -> None:
    n, counter = 100_000, torch.arange(100_000)
    if axis == "seed":
        x = torch.stack([random.uniform(seed, counter[:10]) for seed in range(n // 10)]).T.flatten()
    else:
        x = random.uniform(1, 0, counter) if axis == "counter" else random.uniform(1, counter, 0)
    assert 0 <= float(x.min()) and float(x.max()) < 1
    assert chi_square((x * 256).long().bincount(minlength=256), torch.full((256,), n / 256.0)) > SIGNIFICANCE
    centred = x - 0.5
    for lag in (1, 2, 3, 8, 64, 10_000):  # of the independent numbers' correlation, the standard deviation is n^-0.5
        correlation = 12 * (centred[:-lag] * centred[lag:]).mean()
        assert abs(float(correlation)) < 4 * (n - lag) ** -0.5, f"lag {lag}"


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A wall clock that the test turns."""
    ticks = SimpleNamespace(now=100.0)
    monkeypatch.setattr(hardware, "moment", lambda: ticks.now)
    return ticks


def test_a_second_counts_for_the_innermost_stage(ticks: SimpleNamespace) -> None:
    clock = Clock()
    for _ in range(2):
        with clock("step"):
            ticks.now += 1
            with clock("update"):
                ticks.now += 2
                with clock("sync"):
                    ticks.now += 4
                with clock("step"):  # a stage within itself
                    ticks.now += 8
            ticks.now += 16
    assert clock.take() == {"time/step": 50, "time/update": 4, "time/sync": 8}
    assert clock.take() == {}


def test_a_stage_that_fails_is_closed(ticks: SimpleNamespace) -> None:
    clock = Clock()
    with clock("step"):
        with pytest.raises(ValueError, match="boom"), clock("update"):
            ticks.now += 2
            raise ValueError("boom")
        ticks.now += 1
    with clock("save"):
        ticks.now += 4
    assert clock.take() == {"time/step": 1, "time/update": 2, "time/save": 4}
