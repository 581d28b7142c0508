"""From final rows to log-probabilities, entropies and samples, with the vocabulary sharded over tensor-parallel ranks.

Few rows are one chunk, whose logits are kept. More are taken in several, whose logits are computed again in the
backward pass: memory does not grow with the rows. The weight's gradient is a sum over the chunks, in at least fp32.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_refine.kernels.fused import fused
from megatron_refine.platform import hardware
from megatron_refine.trainer.model import RefineModel

CHUNK_ELEMENTS = 1 << 22  # logits of a chunk of rows on one rank: 16 MiB in fp32, of which caches hold much
GPU_CHUNK_ELEMENTS = 1 << 26  # on a GPU: each chunk reads the whole weight, and adds to all of its gradient
GPU_KEPT_ELEMENTS = 1 << 29  # 1 GiB in bf16; on a CPU no more than a chunk
ALIGNED = 128  # rows, where a chunk has more


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
    weight, group = model.output_weight(), model.pg_collection.tp
    real = model.real_vocab - group.rank() * weight.shape[0]
    return Scores(*_VocabParallelScores.apply(rows, weight, targets, temperature, group, real))


def chunk_rows(weight: Tensor, count: int) -> int:
    """Rows of a chunk, for a weight [V/tp, hidden]: all `count` of them, where their logits may be kept."""
    gpu, width = hardware.on_gpu(weight), weight.shape[0]
    if count * width <= (GPU_KEPT_ELEMENTS if gpu else CHUNK_ELEMENTS):
        return max(1, count)
    rows = max(1, (GPU_CHUNK_ELEMENTS if gpu else CHUNK_ELEMENTS) // width)
    return rows - rows % ALIGNED if rows > ALIGNED else rows


class _VocabParallelScores(torch.autograd.Function):
    """log softmax(z)[target], the entropy and the hit of the argmax, for logits z sharded along the vocabulary.

    dz = (1[target] - softmax(z)) d log p / temperature. rows [R, hidden], weight [V/tp, hidden], targets [R], at [R]
    temperatures or None; real: ids of this rank's part that are no padding.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor, at: Tensor | None, group: Any, real: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        local, size = targets - group.rank() * weight.shape[0], chunk_rows(weight, len(rows))
        logits = weight.new_empty(0)
        found = []
        for chunk, wanted, temperature in _chunks(size, rows, local, at):
            logits = chunk @ weight.mT
            found.append(_statistics(logits, wanted, temperature, real))
        mine = found[0] if len(found) == 1 else torch.cat(found, 1)
        tops, totals, weighted, targeted = _gather(mine, group).unbind(1)  # of each rank's logits, [tp, R]
        scales = (tops - tops.amax(0)).exp()
        total, target = (totals * scales).sum(0), targeted.sum(0)
        log_total = tops.amax(0) + total.log()
        entropy, correct = log_total - (weighted * scales).sum(0) / total, target >= tops.amax(0)
        kept = logits if len(found) == 1 else None
        ctx.save_for_backward(rows, weight, local, at, log_total, kept)
        ctx.real = real
        ctx.mark_non_differentiable(entropy, correct)
        return target - log_total, entropy, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        rows, weight, local, at, log_total, kept = ctx.saved_tensors
        size = chunk_rows(weight, len(rows))
        into_rows, into_weight = [], None
        for chunk, wanted, temperature, totals, outer in _chunks(size, rows, local, at, log_total, grad):
            logits = chunk @ weight.mT if kept is None else kept
            into = _into_logits(logits, wanted, temperature, totals, outer, ctx.real)
            if ctx.needs_input_grad[0]:
                into_rows.append(into @ weight)
            if ctx.needs_input_grad[1]:
                into_weight = into.mT @ chunk if kept is not None else _add_product(into_weight, into.mT, chunk)
        found = torch.cat(into_rows) if into_rows else None
        return found, None if into_weight is None else into_weight.to(weight.dtype), None, None, None, None


def _chunks(size: int, *columns: Tensor | None) -> Any:
    """`size` rows of all tensors at a time, once where there are none; None stays."""
    count = max(1, -(-len(columns[0]) // size))  # type: ignore[arg-type]
    return zip(*([None] * count if x is None else x.split(size) for x in columns), strict=True)


def _prepared(logits: Tensor, temperature: Tensor | None, real: int) -> Tensor:
    """In at least fp32, at the temperature of each row, padding ids at a very low value."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature is not None:
        logits = logits / temperature[:, None].to(logits.dtype)
    if real < logits.shape[1]:
        padding = torch.arange(logits.shape[1], device=logits.device) >= real
        logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min / 2)
    return logits


@fused
def _statistics(logits: Tensor, local: Tensor, temperature: Tensor | None, real: int) -> Tensor:
    """Of this rank's logits [R, V/tp] the highest, the sum of exp(z - highest), that of their products with z, and the
    target's (0 where it is another rank's): [4, R]."""
    logits = _prepared(logits, temperature, real)
    highest, width = logits.amax(-1), logits.shape[1]
    weights = (logits - highest[:, None]).exp_()
    target = logits.gather(1, local.clamp(0, width - 1)[:, None])[:, 0] * ((local >= 0) & (local < width))
    return torch.stack([highest, weights.sum(-1), torch.linalg.vecdot(weights, logits), target])


@fused
def _into_logits(
    logits: Tensor, local: Tensor, temperature: Tensor | None, log_total: Tensor, grad: Tensor, real: int
) -> Tensor:
    """The gradient of this rank's logits [R, V/tp], in their own precision, by that of the log-probabilities [R]."""
    outer = grad if temperature is None else grad / temperature.to(grad.dtype)
    scaled, width = _prepared(logits, temperature, real), logits.shape[1]
    found = (scaled - log_total[:, None]).exp_().mul_(-outer[:, None])
    if hardware.on_gpu(logits):  # in the one kernel
        ids = torch.arange(width, device=logits.device)
        found = torch.where(ids == local[:, None], found + outer[:, None], found)
    else:
        here = (local >= 0) & (local < width)
        found.scatter_add_(1, local.clamp(0, width - 1)[:, None], (outer * here)[:, None])
    return found.to(logits.dtype)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """total + left @ right, kept in at least fp32."""
    high = torch.promote_types(left.dtype, torch.float32)
    if total is None:
        total = left.new_zeros(left.shape[0], right.shape[1], dtype=high)
    if high == left.dtype:
        return total.addmm_(left, right)
    if hardware.on_gpu(left):
        return torch.addmm(total, left, right, out_dtype=high)
    return total.add_(left @ right)  # a product of a chunk is rounded once


@torch.no_grad()
def sample(
    model: RefineModel, rows: Tensor, uniform: Tensor, temperature: float, top_p: float = 1.0,
    banned: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Draw one token after each row, by inverting the cumulative distribution at `uniform` [R] in [0, 1).

    Sums run in fp64, in the order of the ids whatever tp is, so that a layout changes a draw only where rounding of a
    logit does. Temperature 0 takes the highest logit, the lowest id of equal ones. Below 1, `top_p` leaves the fewest
    most probable tokens that have this probability together (nucleus sampling, arXiv 1904.09751). `banned` ids are not
    drawn, and count in the distribution.
    Returns: tokens [R], their log-probabilities [R], `scored_at` the temperature, among the tokens that were left.
    """
    logits, group = model.logits(rows), model.pg_collection.tp
    rank, width = group.rank(), logits.shape[1]
    shut = [i - rank * width for i in banned if 0 <= i - rank * width < width]
    kept = [logits[:, i].clone() for i in shut]
    for i in shut:  # one by one: a list of ids would have to travel to the device
        logits[:, i] = torch.finfo(logits.dtype).min / 2
    highest, first = logits.max(-1)  # the first of equal ones
    shifted = (logits - highest[:, None]).double() / scored_at(temperature)
    if top_p < 1 and temperature > 0:
        shifted = _nucleus(shifted, highest.double() / temperature, top_p, group)
    cumulative = shifted.exp().cumsum(-1)
    apart = [((logit - highest).double() / scored_at(temperature)).exp() for logit in kept]
    mine = torch.stack([highest.double() / scored_at(temperature), cumulative[:, -1], sum(apart, cumulative[:, -1])])
    tops, sums, whole = _gather(mine, group).unbind(1)  # of each rank's logits, [tp, R]
    offsets = tops - tops.amax(0)  # of each rank's highest logit below the highest of all
    scales = offsets.exp()
    if temperature == 0:
        owner, index = (offsets == 0).int().argmax(0), first
    else:
        owner, index = _invert_cdf(cumulative * scales[rank, :, None], sums * scales, uniform.double(), rank)
    drawn = shifted.gather(1, index[:, None])[:, 0] + offsets[rank]
    token = (index + rank * width).clamp(max=model.real_vocab - 1)
    candidates = _gather(torch.stack([token.double(), drawn]), group)  # ids are exact in fp64
    token, drawn = candidates[owner, :, torch.arange(len(owner), device=owner.device)].unbind(-1)
    total = (whole * scales).sum(0)
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
