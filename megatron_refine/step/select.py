"""Where rollouts start: one position in each chunk of a sequence, drawn by entropy (arXiv 2602.16704, section 3.1).

The entropy at index t is that of predicting token t+1, so that the first token of a rollout is the uncertain one: a
rollout from index t starts at position p = t + 1.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_refine.step.hooks import resolve


def smoothed_entropy(entropy: Tensor, lengths: Tensor, rollout_len: int) -> Tensor:
    """Average over a centred window of k (k+1 if even) tokens; beyond either end of the sequence counts as zero.

    entropy [B, T] nats, lengths [B] -> [B, T].
    """
    inside = torch.arange(entropy.shape[1], device=entropy.device) < lengths[:, None]
    entropy = entropy * inside
    window = rollout_len + 1 - rollout_len % 2
    return F.avg_pool1d(entropy[:, None], window, 1, window // 2)[:, 0] if window > 1 else entropy


def uniform_weights(entropy: Tensor, lengths: Tensor, rollout_len: int) -> Tensor:
    """Every index alike."""
    return torch.zeros_like(entropy)


def raw_entropy(entropy: Tensor, lengths: Tensor, rollout_len: int) -> Tensor:
    """The unsmoothed entropy: argmax takes the highest of a chunk."""
    return entropy


def negative_entropy(entropy: Tensor, lengths: Tensor, rollout_len: int) -> Tensor:
    """argmin takes the lowest entropy of a chunk."""
    return -entropy


SELECTIONS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "entropy": smoothed_entropy,
    "uniform": uniform_weights,
    "argmax": raw_entropy,
    "argmin": negative_entropy,
}
DETERMINISTIC = {"argmax", "argmin"}


def select_positions(
    entropy: Tensor,
    lengths: Tensor,
    uniform: Tensor,
    *,
    selection: str,
    rollout_len: int,
    margin: int,
    temperature: float,
) -> Tensor:
    """One position a chunk, drawn from softmax(weights / temperature) over the chunk, then kept off both ends.

    A sequence of L tokens has c chunks of floor(L / c) indices; the last L mod c are never drawn. A position is clamped
    to [margin, L - max(margin, k)], so that k true tokens follow it.
    Args: entropy [B, T] nats; lengths [B]; uniform [B, c] in [0, 1).
    Returns: positions [B, c]; 1 for every chunk of a sequence that is too short for the margins.
    """
    weights = resolve("refine.selection", selection, SELECTIONS)(entropy, lengths, rollout_len)
    starts, windows = _by_chunk(weights, lengths, uniform.shape[1])
    if selection in DETERMINISTIC:
        drawn = windows.argmax(-1)
    else:
        cumulative = (windows / temperature).softmax(-1).cumsum(-1)
        drawn = (cumulative <= (uniform * cumulative[..., -1])[..., None]).sum(-1)
    return _kept_off_ends(starts + drawn, lengths[:, None], margin, rollout_len)


def position_chances(
    entropy: Tensor, lengths: Tensor, chunks: int, *, rollout_len: int, margin: int, temperature: float
) -> Tensor:
    """Probability that `select_positions` takes a position in one chunk or more, by the smoothed entropy.

    Args: entropy [B, T] nats; lengths [B]. Returns: [B, T] by position.
    """
    starts, windows = _by_chunk(smoothed_entropy(entropy, lengths, rollout_len), lengths, chunks)
    index = starts[..., None] + torch.arange(windows.shape[2], device=entropy.device)
    positions = _kept_off_ends(index, lengths[:, None, None], margin, rollout_len)
    chances = (windows / temperature).softmax(-1)
    found = chances.new_zeros(*starts.shape, entropy.shape[1]).scatter_add(2, positions, chances)
    return 1 - (1 - found).prod(1)


def _by_chunk(weights: Tensor, lengths: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
    """Weights [B, T] -> first index of each chunk [B, c], and its weights [B, c, size], -inf where it has none."""
    size = (lengths // chunks).clamp(min=1)
    offsets = torch.arange(max(weights.shape[1] // chunks, 1), device=weights.device)  # of the longest there may be
    starts = size[:, None] * torch.arange(chunks, device=weights.device)
    index = (starts[..., None] + offsets).clamp(max=weights.shape[1] - 1)
    inside = offsets < size[:, None, None]
    return starts, weights.gather(1, index.flatten(1)).view(index.shape).double().masked_fill(~inside, -torch.inf)


def _kept_off_ends(index: Tensor, lengths: Tensor, margin: int, rollout_len: int) -> Tensor:
    """Positions of drawn indices; 1 for all of a sequence that is too short for the margins."""
    low, high = margin, lengths - max(margin, rollout_len)
    return torch.where(high >= low, torch.minimum((index + 1).clamp(min=low), high), 1)


def usable(lengths: Tensor, chunks: int, margin: int, rollout_len: int) -> Tensor:
    """Whether a sequence is long enough for c positions: [B] -> [B] bool."""
    return lengths >= max(chunks, margin + max(margin, rollout_len))
