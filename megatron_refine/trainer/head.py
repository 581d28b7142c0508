"""From final rows to log-probabilities, entropies and samples, with the vocabulary sharded over tensor-parallel ranks.

Rows are taken in chunks; where there are several, their logits are recomputed in the backward pass, so that no rank
ever holds [T, V].
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from megatron_refine.trainer.model import RefineModel

CHUNK_ELEMENTS = 1 << 22  # logits of a chunk of rows on one rank: 16 MiB in fp32


@dataclass(frozen=True)
class Scores:
    """Of R rows."""

    logprobs: Tensor  # [R] of the targets, in the graph
    entropy: Tensor  # [R] nats, no gradient
    correct: Tensor  # [R] bool: the target has the highest logit


def scored_at(temperature: float) -> float:
    """The temperature at which tokens are scored that were drawn at `temperature`: the same, but 1 for greedy ones."""
    return temperature or 1.0


def score(model: RefineModel, rows: Tensor, targets: Tensor, temperature: Tensor | None = None) -> Scores:
    """Log-probability of `targets` [R] after `rows` [R, hidden], and the entropy of the whole distribution.

    temperature: [R] of each row's distribution; None: 1.
    """
    weight = model.shared_embedding_or_output_weight()
    size = max(1, CHUNK_ELEMENTS // weight.shape[0])
    group = model.pg_collection.tp

    def chunk_scores(chunk: Tensor, wanted: Tensor, at: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return _VocabParallelScores.apply(model.logits(chunk, at), wanted, group)

    if len(rows) <= size:  # one chunk: keeping it stays within the bound
        return Scores(*chunk_scores(rows, targets, temperature))
    chunks = rows.split(size)
    at = [None] * len(chunks) if temperature is None else temperature.split(size)
    parts = [
        checkpoint(chunk_scores, *given, use_reentrant=False, preserve_rng_state=False)
        for given in zip(chunks, targets.split(size), at, strict=True)
    ]
    return Scores(*(torch.cat(column) for column in zip(*parts, strict=True)))


class _VocabParallelScores(torch.autograd.Function):
    """log softmax(z)[target], the entropy and the hit of the argmax, for logits sharded along the vocabulary."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
        width, rank = logits.shape[1], group.rank()
        highest = logits.amax(-1)
        weights = (logits - highest[:, None]).exp_()
        local = targets - rank * width
        here = (local >= 0) & (local < width)
        local = local.clamp(0, width - 1)
        target = logits.gather(1, local[:, None])[:, 0] * here
        mine = torch.stack([highest, weights.sum(-1), torch.linalg.vecdot(weights, logits), target])
        tops, totals, weighted, targeted = _gather(mine, group).unbind(1)  # of each rank's logits, [tp, R]
        scales = (tops - tops.amax(0)).exp()
        total, target = (totals * scales).sum(0), targeted.sum(0)
        log_total = tops.amax(0) + total.log()
        entropy, correct = log_total - (weighted * scales).sum(0) / total, target >= tops.amax(0)
        ctx.save_for_backward(weights.mul_((scales[rank] / total)[:, None]), local, here)
        ctx.mark_non_differentiable(entropy, correct)
        return target - log_total, entropy, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None, None]:
        softmax, local, here = ctx.saved_tensors
        grad_logits = softmax.mul(-grad[:, None])
        return grad_logits.scatter_add_(1, local[:, None], (grad * here)[:, None]), None, None


@torch.no_grad()
def sample(
    model: RefineModel, rows: Tensor, uniform: Tensor, temperature: float, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Draw one token after each row, by inverting the cumulative distribution at `uniform` [R] in [0, 1).

    Sums run in fp64, in the order of the ids whatever tp is, so that a layout changes a draw only where rounding of a
    logit does. Temperature 0 takes the highest logit, the lowest id of equal ones. Below 1, `top_p` leaves the fewest
    most probable tokens that have this probability together (nucleus sampling, arXiv 1904.09751).
    Returns: tokens [R], their log-probabilities [R], `scored_at` the temperature, among the tokens that were left.
    """
    logits, group = model.logits(rows), model.pg_collection.tp
    rank = group.rank()
    highest, first = logits.max(-1)  # the first of equal ones
    shifted = (logits - highest[:, None]).double() / scored_at(temperature)
    if top_p < 1 and temperature > 0:
        shifted = _nucleus(shifted, highest.double() / temperature, top_p, group)
    cumulative = shifted.exp().cumsum(-1)
    mine = torch.stack([highest.double() / scored_at(temperature), cumulative[:, -1]])
    tops, sums = _gather(mine, group).unbind(1)  # of each rank's logits, [tp, R]
    offsets = tops - tops.amax(0)  # of each rank's highest logit below the highest of all
    scales = offsets.exp()
    if temperature == 0:
        owner, index = (offsets == 0).int().argmax(0), first
    else:
        owner, index = _invert_cdf(cumulative * scales[rank, :, None], sums * scales, uniform.double(), rank)
    drawn = shifted.gather(1, index[:, None])[:, 0] + offsets[rank]
    token = (index + rank * logits.shape[1]).clamp(max=model.real_vocab - 1)
    candidates = _gather(torch.stack([token.double(), drawn]), group)  # ids are exact in fp64
    token, drawn = candidates[owner, :, torch.arange(len(owner), device=owner.device)].unbind(-1)
    total = (sums * scales).sum(0)
    return token.long(), (drawn - total.log()).to(logits.dtype)


def _nucleus(shifted: Tensor, highest: Tensor, top_p: float, group: Any) -> Tensor:
    """Logits [R, V/tp] below this rank's highest one [R], -inf for tokens out of the nucleus; equal ones are all in."""
    own = (shifted + (highest - _gather(highest, group).amax(0))[:, None]).exp()
    falling = _gather(own, group).transpose(0, 1).flatten(1).sort(descending=True).values
    before = falling.cumsum(-1) - falling
    kept = before < top_p * falling.sum(-1, keepdim=True)  # the first one always is
    floor = falling.gather(1, kept.sum(-1, keepdim=True) - 1)
    return shifted.masked_fill(own < floor, -torch.inf)


def _invert_cdf(cumulative: Tensor, sums: Tensor, uniform: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The rank that holds the drawn id, and its index there: cumulative [R, V/tp], sums [tp, R], uniform [R]."""
    edges = sums.cumsum(0)
    threshold = uniform * edges[-1]
    owner = (edges <= threshold).sum(0).clamp(max=len(sums) - 1)
    below = edges[rank] - sums[rank]
    index = (cumulative <= (threshold - below)[:, None]).sum(-1)
    return owner, index.clamp(max=cumulative.shape[1] - 1)


def _gather(values: Tensor, group: Any) -> Tensor:
    """Every rank's values, in rank order: [...] -> [tp, ...]."""
    if group.size() == 1:
        return values[None]
    gathered = values.new_empty(group.size() * len(values), *values.shape[1:])
    dist.all_gather_into_tensor(gathered, values.contiguous(), group=group)
    return gathered.unflatten(0, (group.size(), -1))
