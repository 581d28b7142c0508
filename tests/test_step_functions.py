"""The pure functions of a step against closed forms, brute-force loops and their definitions."""

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_refine.config import ConfigError
from megatron_refine.records import Experience
from megatron_refine.step.advantage import advantages, zero_variance_groups
from megatron_refine.step.hooks import resolve
from megatron_refine.step.metrics import rollout_sums
from megatron_refine.step.mismatch import token_weights
from megatron_refine.step.objective import next_token_sums, policy_terms
from megatron_refine.step.reward import binary, cosine, hybrid
from megatron_refine.step.select import SELECTIONS, select_positions, smoothed_entropy, usable

Row = list[float]
SIGNIFICANCE = 1e-3  # of every chi-square test: draws that follow the definition fail for one seed in a thousand
DRAWS = 20_000


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def smooth(entropy: Row, k: int) -> Row:
    """Mean over a window of k (k+1 if even), with zeros around the sequence."""
    half = k // 2
    padded = [0.0] * half + entropy + [0.0] * half
    return [sum(padded[t : t + 2 * half + 1]) / (2 * half + 1) for t in range(len(entropy))]


def place(index: int, length: int, k: int, margin: int) -> int:
    return min(max(index + 1, margin), length - max(margin, k))


def definition(weights: Row, chunks: int, k: int, margin: int, temperature: float) -> list[dict[int, float]]:
    """For each chunk, the probability of each position: softmax over the chunk, then the clamp to the margins."""
    size, found = len(weights) // chunks, []
    for j in range(chunks):
        exps = [math.exp(w / temperature) for w in weights[j * size : (j + 1) * size]]
        chances: dict[int, float] = {}
        for i, e in enumerate(exps):
            p = place(j * size + i, len(weights), k, margin)
            chances[p] = chances.get(p, 0.0) + e / sum(exps)
        found.append(chances)
    return found


def chi_square(counts: Tensor, expected: Tensor) -> float:
    """p-value; bins that expect fewer than five draws count as one."""
    few = expected < 5
    counts, expected = (torch.cat([x[~few], x[few].sum()[None]]) for x in (counts.double(), expected))
    assert not counts[expected == 0].any()
    terms = ((counts - expected).square() / expected)[expected > 0]
    return float(torch.special.gammaincc(torch.tensor((len(terms) - 1) / 2.0), terms.sum().cpu() / 2))


@pytest.mark.parametrize("k", [1, 2, 4, 5, 7])
def test_smoothing_equals_the_loop_on_real_tokens(k: int) -> None:
    entropy, lengths = 1e6 * random(3, 30), torch.tensor([30, 11, 1])
    for b, length in enumerate(lengths.tolist()):
        entropy[b, :length] = 5 * random(length, seed=b + 1)
    found = smoothed_entropy(entropy, lengths, k)
    for b, length in enumerate(lengths.tolist()):
        truth = torch.tensor(smooth(entropy[b, :length].tolist(), k), dtype=torch.float64)
        torch.testing.assert_close(found[b, :length], truth, rtol=1e-12, atol=1e-12)  # fp64, at most 7 additions


@pytest.mark.parametrize("selection", ["entropy", "uniform"])
@pytest.mark.parametrize(
    ("k", "margin", "temperature"), [(1, 1, 1.0), (4, 1, 0.3), (5, 6, 1.0), (5, 3, 3.0), (7, 2, 0.5)]
)
def test_draws_follow_the_definition(selection: str, k: int, margin: int, temperature: float) -> None:
    length, chunks = 43, 3  # the last of 43 tokens belongs to no chunk
    entropy, uniform = 4 * random(1, 50, seed=k), random(DRAWS, chunks, seed=7 * k + margin)
    rows, lengths = entropy.expand(DRAWS, -1), torch.full((DRAWS,), length)
    found = select_positions(
        rows, lengths, uniform, selection=selection, rollout_len=k, margin=margin, temperature=temperature
    )
    weights = smooth(entropy[0, :length].tolist(), k) if selection == "entropy" else [0.0] * length
    for j, chances in enumerate(definition(weights, chunks, k, margin, temperature)):
        counts = torch.bincount(found[:, j], minlength=length)
        expected = torch.zeros(length, dtype=torch.float64)
        expected[list(chances)] = DRAWS * torch.tensor(list(chances.values()), dtype=torch.float64)
        assert not counts[expected == 0].any()
        assert chi_square(counts, expected) > SIGNIFICANCE, f"chunk {j}"


def select(entropy: Tensor, lengths: Tensor, uniform: Tensor, selection: str = "entropy", k: int = 1) -> Tensor:
    return select_positions(entropy, lengths, uniform, selection=selection, rollout_len=k, margin=1, temperature=1.0)


def test_the_draw_inverts_the_cumulative_distribution() -> None:
    entropy = torch.tensor([[1.0, 2, 3, 4]]).log().repeat(6, 1)  # weights 1, 2 | 3, 4 of chunks (0, 1) and (2, 3)
    below_one = 1 - 2.0**-53  # the highest uniform there is
    first, second = 1 / 3, 3 / 7
    rows = [[0, 0], [first - 1e-6, second - 1e-6], [first + 1e-6, second + 1e-6], [below_one] * 2, [0, 1e-3], [0.9, 0]]
    found = select(entropy, torch.full((6,), 4), torch.tensor(rows, dtype=torch.float64))
    assert found.tolist() == [[1, 3], [1, 3], [2, 3], [2, 3], [1, 3], [2, 3]]  # index 3 starts at 4, clamped to L - k


def test_no_draw_of_zero_probability() -> None:
    entropy = torch.tensor([[0.0, 3000, 0, 0, 3000, 0]])
    for u in (0.0, 0.5, 1 - 2.0**-53):
        assert select(entropy, torch.tensor([6]), torch.full((1, 2), u, dtype=torch.float64)).tolist() == [[2, 5]]


@pytest.mark.parametrize(("selection", "pick"), [("argmax", max), ("argmin", min)])
def test_deterministic_selections_take_the_raw_extreme(selection: str, pick: Callable[..., int]) -> None:
    entropy, lengths = random(4, 50, seed=3), torch.tensor([50, 43, 30, 12])
    entropy[0, 5], entropy[0, 9] = entropy[0, :12].max(), entropy[0, :12].max()  # of equal ones the first
    found = select(entropy, lengths, random(4, 3), selection, k=5)
    for b, length in enumerate(lengths.tolist()):
        size = length // 3
        picks = [pick(range(j * size, (j + 1) * size), key=lambda i: float(entropy[b, i])) for j in range(3)]  # noqa: B023
        assert found[b].tolist() == [place(i, length, 5, 1) for i in picks]


@pytest.mark.parametrize("selection", SELECTIONS)
def test_ragged_rows_are_selected_as_if_alone(selection: str) -> None:
    lengths = torch.tensor([64, 40, 33, 21, 9])
    entropy, uniform = 5 * random(5, 64), random(5, 4, seed=1)
    found = select(entropy, lengths, uniform, selection, k=4)
    for b, length in enumerate(lengths.tolist()):
        alone = select(entropy[b : b + 1, :length], lengths[b : b + 1], uniform[b : b + 1], selection, k=4)
        assert torch.equal(found[b], alone[0])


@pytest.mark.parametrize(("chunks", "margin", "k"), [(4, 20, 5), (4, 3, 9), (8, 1, 1), (1, 1, 1)])
def test_rows_too_short_are_flagged_and_harmless(chunks: int, margin: int, k: int) -> None:
    lengths = torch.arange(1, 60)
    entropy, uniform = random(59, 60), random(59, chunks, seed=2)
    found = select_positions(
        entropy, lengths, uniform, selection="entropy", rollout_len=k, margin=margin, temperature=1.0
    )
    flags = usable(lengths, chunks, margin, k).tolist()
    for length, flag, positions in zip(lengths.tolist(), flags, found.tolist(), strict=True):
        fits = length - max(margin, k) >= margin
        assert flag == (fits and length >= chunks)
        assert all(margin <= p <= length - max(margin, k) for p in positions) if fits else set(positions) == {1}


def first_chunk_late(entropy: Tensor, lengths: Tensor, rollout_len: int) -> Tensor:
    """A selection rule of one's own: the last index of each chunk."""
    return 1000.0 * torch.arange(entropy.shape[1]).expand(entropy.shape)


def test_selection_by_import_path() -> None:
    found = select(random(1, 20), torch.tensor([20]), random(1, 2), f"{__name__}:first_chunk_late")
    assert found.tolist() == [[10, 19]]


def test_rewards_of_known_rollouts() -> None:
    truth = torch.tensor([[[7, 8]]])
    tokens = torch.tensor([[[[7, 8], [7, 9], [8, 7]]]])  # all, half, none in place
    true = torch.tensor([[1.0, 0], [0, 2]]).view(1, 1, 2, 2)
    same, mixed, opposite = torch.tensor([[3.0, 0], [0, 1]]), torch.tensor([[1.0, 0], [1, 0]]), -true[0, 0]
    pred = torch.stack([same, mixed, opposite]).view(1, 1, 3, 2, 2)
    assert binary(tokens, truth, pred, true).tolist() == [[[1, 0.5, 0]]]
    # fp32 arithmetic on values of order one: a few roundings of 6e-8
    torch.testing.assert_close(cosine(tokens, truth, pred, true), torch.tensor([[[1, 0.5, -1]]]), rtol=0, atol=1e-6)
    torch.testing.assert_close(hybrid(tokens, truth, pred, true), torch.tensor([[[2, 1.0, -1]]]), rtol=0, atol=1e-6)


def test_rewards_equal_loops() -> None:
    b, c, n, k, h = 2, 3, 4, 5, 6
    pred, true = random(b, c, n, k, h) - 0.5, random(b, c, k, h, seed=1) - 0.5
    tokens, truth = (3 * random(b, c, n, k)).long(), (3 * random(b, c, k, seed=2)).long()
    for i, j, r in torch.cartesian_prod(torch.arange(b), torch.arange(c), torch.arange(n)).tolist():
        hits, similarity = 0.0, 0.0
        for t in range(k):
            x, y = pred[i, j, r, t].tolist(), true[i, j, t].tolist()
            similarity += sum(p * q for p, q in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y) / k
            hits += (int(tokens[i, j, r, t]) == int(truth[i, j, t])) / k
        expected = {cosine: similarity, binary: hits, hybrid: similarity + hits}
        for reward, value in expected.items():  # rewards are fp32
            assert float(reward(tokens, truth, pred, true)[i, j, r]) == pytest.approx(value, abs=1e-6)


def normalized(group: Row, eps: float) -> Row:
    if len(group) == 1:
        return [group[0] / (1 + eps)]
    return [(x - statistics.mean(group)) / (statistics.stdev(group) + eps) for x in group]


@pytest.mark.parametrize("shape", [(3, 4, 1), (3, 4, 5), (2, 1, 1), (2, 1, 3), (2, 2, 2)])
def test_advantages_equal_the_loop(shape: tuple[int, int, int]) -> None:
    rewards, eps = random(*shape), 1e-2
    found = advantages(rewards, eps)
    for b in range(shape[0]):
        groups = [rewards[b, :, 0]] if shape[2] == 1 else list(rewards[b])
        theirs = [found[b, :, 0]] if shape[2] == 1 else list(found[b])
        for group, mine in zip(groups, theirs, strict=True):
            assert mine.tolist() == pytest.approx(normalized(group.tolist(), eps), rel=1e-12)  # fp64


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_reward_that_is_not_finite_makes_no_advantage_of_its_group(bad: float) -> None:
    """It is never taken for one that equals the others: the step is not finite, which is said and counted."""
    rewards = random(2, 3, 4)
    rewards[0, 1, 2] = bad
    found = advantages(rewards)
    assert found[0, 1].isnan().all() and int(found.isnan().sum()) == 4
    assert zero_variance_groups(rewards).tolist() == [0, 0]


@pytest.mark.parametrize("group", ["auto", "sequence", "position"])
@pytest.mark.parametrize("shape", [(3, 4, 1), (2, 4, 5), (2, 1, 3), (1, 1, 1)])
def test_groups_that_are_named(group: str, shape: tuple[int, int, int]) -> None:
    rewards, eps = random(*shape), 1e-2
    rewards[0] = 0.25
    found, still = advantages(rewards, eps, group=group), zero_variance_groups(rewards, group)
    for b in range(shape[0]):
        whole = group == "sequence" or (group == "auto" and shape[2] == 1)
        groups = [rewards[b].flatten().tolist()] if whole else rewards[b].tolist()
        expected = [x for members in groups for x in normalized(members, eps)]
        assert found[b].flatten().tolist() == pytest.approx(expected, rel=1e-12)  # fp64
        alike = [len(members) > 1 and len(set(members)) == 1 for members in groups]
        assert float(still[b]) == pytest.approx(sum(alike) / len(alike))


@pytest.mark.parametrize("shape", [(3, 8, 1), (2, 4, 5), (2, 1, 1)])
def test_advantages_without_the_standard_deviation(shape: tuple[int, int, int]) -> None:
    rewards = random(*shape)
    found = advantages(rewards, 1e-2, scaled=False)
    mean = rewards.mean((1, 2), keepdim=True) if shape[2] == 1 else rewards.mean(2, keepdim=True)
    expected = rewards if shape[1:] == (1, 1) else rewards - mean
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not advantages(torch.full((1, 8, 1), 0.3), scaled=False).any()


@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 6, 1), (1, 2, 3), (2, 4, 5)])
@pytest.mark.parametrize("ulps", [0, 1, 3])
def test_rewards_equal_up_to_rounding_teach_nothing(shape: tuple[int, int, int], ulps: int) -> None:
    """The mean of equal rewards that are no binary fraction is an ulp off; equal rewards may be some apart."""
    for value in (0.1, 0.3, 0.7, -0.6, 1.9, 1e-3, 0.0):
        rewards = torch.full(shape, value)
        rewards.view(-1)[0] *= 1 + ulps * 2.0**-23
        assert not advantages(rewards).any(), value
        assert zero_variance_groups(rewards).tolist() == [1.0] * shape[0]
        rewards.view(-1)[0] += 2e-6 * max(abs(value), 1e-3)  # no rounding: the first group teaches
        share = 0.0 if shape[2] == 1 else 1 - 1 / shape[1]
        assert zero_variance_groups(rewards).tolist() == [share] + [1.0] * (shape[0] - 1)
        first = advantages(rewards)[0] if shape[2] == 1 else advantages(rewards)[0, 0]
        assert first.all(), value


def test_groups_without_variance_teach_nothing() -> None:
    rewards = torch.tensor([[[0.3, 0.3], [0.3, 0.3]], [[0.3, 0.3], [0.1, 0.4]]])
    assert not advantages(rewards)[0].any() and not advantages(rewards)[1, 0].any()
    assert zero_variance_groups(rewards).tolist() == [1, 0.5]
    assert zero_variance_groups(rewards[..., :1]).tolist() == [1, 0]  # one rollout: the group is the sequence
    assert not advantages(rewards[..., :1])[0].any()
    alone = rewards[:, :1, :1]  # a group of one keeps its reward, and so it teaches
    assert advantages(alone, 0.0).equal(alone) and zero_variance_groups(alone).tolist() == [0, 0]
    broken = torch.tensor([[[math.nan, 0.3], [math.inf, math.inf]]])  # no group without variance
    assert advantages(broken).isnan().all() and zero_variance_groups(broken).tolist() == [0]


@pytest.mark.parametrize("case", range(6))
def test_equals_the_official_code(case: int) -> None:
    """Of unpadded rows: tests/golden/README.md. fp32, sums of up to 16 products in another order. The values of the
    keys are those of a preset under configs/official.yaml."""
    from megatron_refine.config import load
    from megatron_refine.models.family import FAMILIES
    from megatron_refine.step.refine import _continuations

    folder = Path(__file__).parents[1] / "configs"
    config = load([str(folder / "posttrain_delta_net_1.3b.yaml"), str(folder / "official.yaml")], [], FAMILIES)
    c, limits = config.refine, config.engine
    stored = load_file(Path(__file__).parent / "golden/official_step/values.safetensors")
    own = {name.removeprefix(f"case{case}."): t for name, t in stored.items() if name.startswith(f"case{case}.")}
    length, k = own["tokens"].shape[1], own["rollouts"].shape[-1]
    for mode in SELECTIONS:
        found = select_positions(
            own["entropy"], torch.full((len(own["tokens"]),), length), own[f"u.{mode}"],
            selection=mode, rollout_len=k, margin=c.margin, temperature=c.temperature,
        )  # fmt: skip
        assert found.equal(own[f"positions.{mode}"]), mode
    rows: Any = SimpleNamespace(take=lambda index, sequences: own["hidden"][sequences, index])
    truth, h_true = _continuations(own["tokens"], rows, own["positions.argmin"], k)
    assert truth.equal(own["truth"]) and h_true.equal(own["h_true"])
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 5e-7}
    for name, reward in {"cosine": cosine, "binary": binary, "hybrid": hybrid}.items():
        earned = reward(own["rollouts"], truth, own["h_pred"], h_true)
        torch.testing.assert_close(earned, own[f"reward.{name}"], **close)
    earned = own["reward.hybrid"]
    found = advantages(earned, c.advantage_eps, c.advantage_std)
    torch.testing.assert_close(found, own["advantage.hybrid"], rtol=1e-3, atol=1e-5)  # near-equal groups
    logprobs, old = own["logprobs"].requires_grad_(), own["old_logprobs"]
    terms = policy_terms(logprobs, old, own["advantage.hybrid"], c.clip_low, c.clip_high, c.dual_clip)
    loss = (terms.loss * token_weights(old, old - 50, limits.mask_gap, limits.importance_cap)).mean()  # none is masked
    torch.testing.assert_close(loss[None], own["loss"], **close)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(gradient, own["grad.logprobs"], **close)


def scalar_term(logp: Tensor, old: float, advantage: float, clip: tuple[float, float, float]) -> tuple[Tensor, bool]:
    """The policy loss of one token and whether a clip is active, case by case; in the graph of `logp`."""
    low, high, dual = clip
    difference = logp - old
    if difference.abs() > 20:
        difference = difference.sign().detach() * 20 + 0 * logp
    ratio = difference.exp()
    if advantage >= 0:
        return (-advantage * (ratio if ratio <= 1 + high else 0 * logp + 1 + high)), bool(ratio > 1 + high)
    if ratio < 1 - low:
        return 0 * logp - advantage * (1 - low), True
    return (0 * logp - advantage * dual, True) if ratio > dual else (-advantage * ratio, False)


def test_policy_terms_equal_the_scalar_formula() -> None:
    differences = [-30, -1.5, -0.3, -0.2, -0.1, 0.0, 0.1, 0.15, 0.25, 0.3, 1.0, 1.2, 2.0, 30]
    old = -3 * random(6, len(differences))
    logprobs = (old + torch.tensor(differences, dtype=torch.float64)).requires_grad_()
    weights = torch.tensor([2.0, 0.7, 1e-3, 0.0, -0.5, -2.0], dtype=torch.float64)
    clip = (0.2, 0.3, 3.0)
    terms = policy_terms(logprobs, old, weights, *clip)
    (gradient,) = torch.autograd.grad(terms.loss.sum(), logprobs)
    for i, j in torch.cartesian_prod(torch.arange(6), torch.arange(len(differences))).tolist():
        logp = logprobs[i, j].detach().requires_grad_()
        loss, active = scalar_term(logp, float(old[i, j]), float(weights[i]), clip)
        (slope,) = torch.autograd.grad(loss, logp)
        case = f"A = {weights[i]}, difference {differences[j]}"
        assert terms.loss[i, j].item() == pytest.approx(loss.item(), rel=1e-12), case  # fp64
        assert float(gradient[i, j]) == pytest.approx(float(slope), rel=1e-12), case
        assert bool(terms.clipped[i, j]) == (active and float(weights[i]) != 0), case
        ratio = math.exp(min(max(differences[j], -20), 20))
        assert float(terms.ratio[i, j]) == pytest.approx(ratio, rel=1e-12), case
    assert not terms.ratio.requires_grad and not terms.clipped.requires_grad


def test_on_policy_gradient_is_reinforce() -> None:
    logprobs, weights = -random(2, 3, 4).requires_grad_(), torch.tensor([[1.5, -0.5, 0.0], [-4.0, 2.0, 0.1]]).double()
    terms = policy_terms(logprobs, logprobs.detach(), weights, 0.2, 0.2, 3.0)
    (gradient,) = torch.autograd.grad(terms.loss.sum(), logprobs)
    assert torch.equal(gradient, -weights[..., None].expand(2, 3, 4)) and not terms.clipped.any()


def test_next_token_sums_count_real_targets() -> None:
    logprobs, lengths = -random(4, 9), torch.tensor([10, 6, 1, 2])
    total, count = next_token_sums(logprobs, lengths)
    pairs = [(b, t) for b, length in enumerate(lengths.tolist()) for t in range(length - 1)]
    assert int(count) == len(pairs) == 15
    assert float(total) == pytest.approx(-sum(float(logprobs[p]) for p in pairs), rel=1e-12)  # fp64


def test_unusable_rows_count_for_no_rollout_metric() -> None:
    rewards, entropy, gap = random(3, 2, 2), random(3, 6, seed=1), random(3, 2, 2, 2, seed=2)
    zero = torch.tensor([0.5, 1.0, 1.0])
    nothing = torch.empty(0)
    weights = random(3, 2, 2, 2, seed=3)
    weights[1:, 0, 1] = 0  # masked: one of an unusable row, one of a usable one
    experience = Experience(nothing, nothing, nothing, nothing, weights, torch.tensor([True, False, True]))
    kinds = random(3, 2, 2, 2, seed=4)
    found = rollout_sums(experience, rewards, kinds, entropy, torch.tensor([6, 2, 4]), zero, gap)
    r, g, (cosines, binaries) = rewards[[0, 2]], gap[[0, 2]], kinds[[0, 2]].unbind(-1)
    tokens = entropy[0].sum() + entropy[1, :2].sum() + entropy[2, :4].sum()
    both = cosines.sum(), binaries.sum()
    of_rewards = r.sum(), (r**2).sum(), *both, r.new_tensor(8)
    expected = torch.stack([*of_rewards, tokens, *r.new_tensor([12, 1.5, 2]), g.sum()])
    weight = float(weights[[0, 2]].sum())
    assert found.tolist() == pytest.approx([*expected.tolist(), 16, 1, weight, 14], rel=1e-12)  # fp64


def test_resolve_finds_functions() -> None:
    assert resolve("refine.reward", "cosine", {"cosine": cosine}) is cosine
    assert resolve("refine.reward", "math:sqrt", {}) is math.sqrt


@pytest.mark.parametrize(
    "name", ["cosin", "no.such.module:f", "math:no_such", "math:pi", "math:", ":f", ".relative:f", "", ":"]
)
def test_resolve_errors_name_the_key(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^refine\.reward="):
        resolve("refine.reward", name, {"cosine": cosine})
