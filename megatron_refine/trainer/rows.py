"""The final rows of a pass, wherever they lie: cut over context parallel ranks, on the last pipeline stage alone.

What is computed from them (log-probabilities, samples) is small and the same on all context parallel ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor

from megatron_refine.trainer import head
from megatron_refine.trainer.model import RefineModel
from megatron_refine.trainer.parallel import from_last_stage


@dataclass(frozen=True)
class Held:
    """The rows, of N, that this rank holds."""

    rows: Tensor  # [M, hidden]
    places: Tensor | None  # [M], which of the N they are; None: all, in order
    total: int  # N


@dataclass(frozen=True)
class Rows:
    model: RefineModel
    local: Tensor | None  # [S/cp, B, hidden], padding at the end of the last part; None before the last pipeline stage

    @classmethod
    def of(cls, model: RefineModel, whole: Tensor) -> "Rows":
        """Take this rank's part of rows [S, B, hidden] that every rank has."""
        group = model.pg_collection.cp
        if group.size() > 1:
            whole = F.pad(whole, (0, 0, 0, 0, 0, -len(whole) % group.size())).chunk(group.size())[group.rank()]
        return cls(model, whole)

    def span(self, length: int) -> Held:
        """The first `length` rows, of each the B sequences'."""
        local, (start, end) = self._part()
        batch = local.shape[1]
        here = local[: max(0, min(length, end) - start)].flatten(0, 1)
        if self.model.pg_collection.cp.size() == 1:
            return Held(here, None, len(here))
        return Held(here, torch.arange(start * batch, start * batch + len(here), device=here.device), length * batch)

    def pick(self, index: Tensor, sequences: Tensor) -> Held:
        """Row index[i] of sequence sequences[i]: [N], [N]."""
        local, (start, end) = self._part()
        if self.model.pg_collection.cp.size() == 1:
            return Held(local[index, sequences], None, len(index))
        places = ((index >= start) & (index < end)).nonzero()[:, 0]
        return Held(local[index[places] - start, sequences[places]], places, len(index))

    @torch.no_grad()
    def take(self, index: Tensor, sequences: Tensor) -> Tensor:
        """One row for each index and sequence (of shapes that broadcast) -> [*, hidden] on every rank; no gradient."""
        index, sequences = torch.broadcast_tensors(index, sequences)
        if self.local is None:
            config = self.model.config
            found = torch.empty(index.numel(), config.hidden_size, dtype=config.params_dtype, device=index.device)
        else:
            held = self.pick(index.flatten(), sequences.flatten())
            found = everywhere(self.model, held.rows, held)
        return from_last_stage(found, self.model.pg_collection.pp).unflatten(0, index.shape)

    def _part(self) -> tuple[Tensor, tuple[int, int]]:
        """What is here: the rows, the first one's number and the number after the last."""
        assert self.local is not None, "the rows are on the last pipeline stage"
        start = self.model.pg_collection.cp.rank() * len(self.local)
        return self.local, (start, start + len(self.local))


def score(
    model: RefineModel, pieces: Sequence[Held], targets: Tensor, temperature: Tensor | None = None
) -> head.Scores:
    """Scores of `targets` [N], one for each row of the pieces in turn, on all context parallel ranks.

    temperature: [N] of the rows' distributions; None: 1. Each rank computes the whole loss from the scores; a row's
    gradient goes to the rank that holds it.
    """
    rows = torch.cat([piece.rows for piece in pieces])
    if all(piece.places is None for piece in pieces):
        return head.score(model, rows, targets, temperature)
    whole = _joined(pieces)
    assert whole.places is not None
    at = None if temperature is None else temperature[whole.places]
    found = head.score(model, rows, targets[whole.places], at)
    columns = [found.logprobs, found.entropy, found.correct.to(found.logprobs.dtype)]
    logprobs, entropy, correct = everywhere(model, torch.stack(columns, 1), whole).unbind(1)
    return head.Scores(logprobs, entropy.detach(), correct > 0)


def sample(
    model: RefineModel, held: Held, uniform: Tensor, temperature: float, top_p: float = 1.0,
    banned: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`head.sample` after each of the N rows, for all context parallel ranks: uniform [N] -> tokens, logprobs."""
    if held.places is None:
        return head.sample(model, held.rows, uniform, temperature, top_p, banned)
    tokens, logprobs = head.sample(model, held.rows, uniform[held.places], temperature, top_p, banned)
    return everywhere(model, tokens, held), everywhere(model, logprobs, held)


def everywhere(model: RefineModel, values: Tensor, held: Held) -> Tensor:
    """Values [M, *] of the rows held here -> [N, *] of all of them, on all context parallel ranks."""
    if held.places is None:
        return values
    whole = values.new_zeros(held.total, *values.shape[1:]).index_copy(0, held.places, values)
    return reduce_from_tensor_model_parallel_region(whole, group=model.pg_collection.cp)


def _joined(pieces: Sequence[Held]) -> Held:
    """Several as one, without its rows."""
    places, total = [], 0
    for piece in pieces:
        own = torch.arange(piece.total, device=piece.rows.device) if piece.places is None else piece.places
        places.append(own + total)
        total += piece.total
    return Held(pieces[0].rows[:0], torch.cat(places), total)
