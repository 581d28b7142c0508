"""From final rows to log-probabilities, entropies and samples, with the vocabulary sharded over tensor-parallel ranks.

Rows are taken in chunks and each chunk's logits are recomputed in the backward pass, so that no rank ever holds [T, V].
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


def score(model: RefineModel, rows: Tensor, targets: Tensor) -> Scores:
    """Log-probability of `targets` [R] after `rows` [R, hidden], and the entropy of the whole distribution."""
    weight = model.shared_embedding_or_output_weight()
    size = max(1, CHUNK_ELEMENTS // weight.shape[0])
    chunks = zip(rows.split(size), targets.split(size), strict=True)
    group = model.pg_collection.tp

    def chunk_scores(chunk: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _VocabParallelScores.apply(model.logits(chunk), wanted, group)

    parts = [checkpoint(chunk_scores, *pair, use_reentrant=False) for pair in chunks]
    return Scores(*(torch.cat(column) for column in zip(*parts, strict=True)))


class _VocabParallelScores(torch.autograd.Function):
    """log softmax(z)[target], the entropy and the hit of the argmax, for logits sharded along the vocabulary."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
        width = logits.shape[1]
        highest = logits.amax(-1)
        _reduce(highest, group, dist.ReduceOp.MAX)
        weights = (logits - highest[:, None]).exp_()
        local = targets - group.rank() * width
        here = (local >= 0) & (local < width)
        local = local.clamp(0, width - 1)
        target = logits.gather(1, local[:, None])[:, 0] * here
        sums = torch.stack([weights.sum(-1), torch.linalg.vecdot(weights, logits), target])
        _reduce(sums, group, dist.ReduceOp.SUM)
        total, weighted, target = sums.unbind(0)
        log_total = highest + total.log()
        ctx.save_for_backward(weights.div_(total[:, None]), local, here)
        entropy, correct = log_total - weighted / total, target >= highest
        ctx.mark_non_differentiable(entropy, correct)
        return target - log_total, entropy, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None, None]:
        softmax, local, here = ctx.saved_tensors
        grad_logits = softmax.mul(-grad[:, None])
        return grad_logits.scatter_add_(1, local[:, None], (grad * here)[:, None]), None, None


@torch.no_grad()
def sample(model: RefineModel, rows: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token after each row, by inverting the cumulative distribution at `uniform` [R] in [0, 1).

    Sums run in fp64, in the order of the ids whatever tp is, so that a layout changes a draw only where rounding of a
    logit does. Temperature 0 takes the highest logit, the lowest id of equal ones.
    Returns: tokens [R], their log-probabilities [R] at temperature 1.
    """
    logits, group = model.logits(rows), model.pg_collection.tp
    if temperature == 0:
        tokens = _argmax(logits, group)
    else:
        tokens = _invert_cdf(logits / temperature, uniform, group).clamp(max=model.real_vocab - 1)
    return tokens, _VocabParallelScores.apply(logits, tokens, group)[0]


def _argmax(logits: Tensor, group: Any) -> Tensor:
    highest, index = logits.max(-1)  # the first of equal ones
    index = index + group.rank() * logits.shape[1]
    best = highest.clone()
    _reduce(best, group, dist.ReduceOp.MAX)
    index = torch.where(highest == best, index, torch.iinfo(index.dtype).max)
    _reduce(index, group, dist.ReduceOp.MIN)
    return index


def _invert_cdf(logits: Tensor, uniform: Tensor, group: Any) -> Tensor:
    highest = logits.amax(-1)
    _reduce(highest, group, dist.ReduceOp.MAX)
    cumulative = (logits - highest[:, None]).double().exp_().cumsum(-1)
    sums = cumulative.new_zeros(group.size(), logits.shape[0])
    sums[group.rank()] = cumulative[:, -1]
    _reduce(sums, group, dist.ReduceOp.SUM)
    below = sums[: group.rank()].sum(0)
    threshold = uniform.double() * sums.sum(0)
    # ids whose cumulative weight stays at or below the threshold lie before the drawn one; each rank counts its own
    count = (below[:, None] + cumulative <= threshold[:, None]).sum(-1)
    _reduce(count, group, dist.ReduceOp.SUM)
    return count


def _reduce(values: Tensor, group: Any, op: Any) -> None:
    if group.size() > 1:
        dist.all_reduce(values, op=op, group=group)
