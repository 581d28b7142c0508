"""Rows of docs/official-names.md, computed as the official code does and as this project does, on the same numbers."""

import math

import pytest
import torch
import torch.nn.functional as F

from megatron_refine.step.advantage import advantages
from megatron_refine.step.objective import next_token_sums
from megatron_refine.step.select import select_positions, smoothed_entropy


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("k", [3, 5, 6])
def test_pads_leak_into_the_first_real_tokens_of_their_pooling(k: int) -> None:
    """Theirs pools the left-padded row; ours real tokens. They differ in the first k // 2 real ones alone."""
    length, pads, window = 40, 24, k + 1 - k % 2
    real, junk = random(1, length), 9 + random(1, pads, seed=1)
    padded = torch.cat([junk, real], 1)
    theirs = F.avg_pool1d(padded[:, None], window, 1, window // 2)[:, 0, pads:]
    ours = smoothed_entropy(F.pad(real, (0, pads), value=9.0), torch.tensor([length]), k)[:, :length]
    differs = (theirs - ours).abs()[0] > 1e-9
    assert differs.nonzero().flatten().tolist() == list(range(window // 2))


def test_their_clamp_leaves_no_truth_for_rollouts_of_more_than_20_tokens() -> None:
    length, k, entropy = 200, 30, torch.zeros(1, 200)
    entropy[0, -1] = 50.0  # the last chunk's choice
    theirs = min(max(199 + 1, 20), length - 20)
    ours = select_positions(
        entropy, torch.tensor([length]), torch.full((1, 1), 0.999), selection="argmax", rollout_len=k, margin=20,
        temperature=1.0,
    )  # fmt: skip
    assert theirs + k > length and int(ours) + k == length


def test_means_of_micro_batches_are_no_mean_over_tokens() -> None:
    """The NTP loss, and the answers' loss, where rows have different lengths; equal ones make no difference."""
    logprobs = -random(4, 15)
    for lengths, same in ((torch.tensor([16, 16, 16, 16]), True), (torch.tensor([16, 3, 9, 4]), False)):
        parts = [next_token_sums(logprobs[i : i + 2], lengths[i : i + 2]) for i in (0, 2)]
        theirs = sum(total / count for total, count in parts) / 2
        total, count = next_token_sums(logprobs, lengths)
        assert (abs(float(theirs - total / count)) < 1e-12) == same


def test_a_sampled_accuracy_rises_where_the_argmax_does_not() -> None:
    """Logits that are multiplied by two: no other prediction, a higher expected accuracy of sampled tokens."""
    logits = 4 * random(500, 20) - 2
    target = torch.where(random(500, seed=1) < 0.6, logits.argmax(-1), torch.arange(500) % 20)
    argmax = [float((x.argmax(-1) == target).double().mean()) for x in (logits, 2 * logits)]
    sampled = [float(x.softmax(-1).gather(1, target[:, None]).mean()) for x in (logits, 2 * logits)]
    assert argmax[0] == argmax[1] and sampled[1] > sampled[0] + 0.05


def test_a_group_of_equal_rewards_teaches_rounding_there_and_nothing_here() -> None:
    rewards = torch.full((1, 6, 1), 0.7)
    rewards[0, 0, 0] += 2.0**-24  # an ulp
    flat = rewards.flatten()
    theirs = (flat - flat.mean()) / (flat.std() + 1e-6)
    assert float(theirs.abs().max()) > 0.01 and not advantages(rewards).any()


def test_a_banned_eos_changes_what_is_drawn_and_no_log_probability() -> None:
    """Theirs: its logit is -inf when a token is drawn. The tokens' ratios stay; the sum of what is drawn is 1 - p(EOS),
    by which an engine that scored what it draws from would be off."""
    logits, eos = 3 * random(7), 2
    whole, drawn = logits.log_softmax(-1), logits.index_fill(0, torch.tensor([eos]), -math.inf).log_softmax(-1)
    kept = torch.arange(7) != eos
    shift = (drawn - whole)[kept]
    assert drawn[eos] == -math.inf
    torch.testing.assert_close(shift, torch.full((6,), -math.log1p(-float(whole[eos].exp())), dtype=torch.float64))
