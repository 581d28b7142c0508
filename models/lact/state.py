"""What LaCT's mixer knows of the tokens so far, by reference wherever nothing was changed.

A branch reads the weights of its chunk and the window of keys before it; both belong to the main stream. Only one that
reaches the end of the chunk needs the chunk's tokens, to update the weights for itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_refine.kernels.lact import Rule, Tokens, Weights, after, join
from megatron_refine.kernels.pick import pick


@dataclass(frozen=True)
class LactState:
    """Of M sequences. The lists have P entries, P dividing M; each serves M/P consecutive sequences."""

    weights: list[Weights]  # of several chunks or sequences
    where: list[tuple[int, int]]  # of each entry: which of `weights`, and the row in it
    chunks: list[Tokens]  # the main stream's tokens, by chunk
    begun: list[tuple[int, int, int]]  # of each entry: chunk, row and number of its main tokens in the open chunk
    fresh: list[int]  # own tokens in the open chunk
    own: Tokens | None  # of M sequences, those of the open chunk last
    prefix: tuple[Tensor, Tensor]  # keys, values [P', L, h, d] of the window before the first own token; P' divides M
    before: Tensor  # [P'] main tokens before the first own one
    fed: int  # own tokens so far, of each sequence
    window: tuple[Tensor, Tensor] | None  # own keys, values [M, t', h, d]
    chunk: int  # tokens of a full one
    gathered: Tensor | None = None  # `used`, once it was asked for

    def tensors(self) -> list[Tensor]:
        """What must be in the graph of the main pass when gradients are on."""
        fast = [matrix for w in self.weights for matrix in (w.used, w.total)]
        return fast + [x for x in self.prefix if x.numel()] + [x for c in self.chunks for x in (c.x, c.rates)]

    def detach(self) -> "LactState":
        return replace(
            self,
            gathered=None,
            weights=[w.detach() for w in self.weights],
            chunks=[c.detach() for c in self.chunks],
            own=self.own and self.own.detach(),
            prefix=(self.prefix[0].detach(), self.prefix[1].detach()),
            window=self.window and (self.window[0].detach(), self.window[1].detach()),
        )

    def part(self, positions: slice) -> "LactState":
        """Those of some of the P positions, before any branch token."""
        assert self.own is None and self.window is None
        lists = {name: getattr(self, name)[positions] for name in _LISTS}
        prefix = self.prefix[0][positions], self.prefix[1][positions]
        return replace(self, prefix=prefix, before=self.before[positions], gathered=None, **lists)

    def fork(self, n: int) -> "LactState":
        """n consecutive copies of each sequence; what they share is not copied."""
        if n == 1 or self.own is None or self.window is None:
            return self  # nothing of their own
        keys, values = (x.repeat_interleave(n, 0) for x in self.window)
        return replace(self, own=self.own.repeat(n), window=(keys, values))

    def fixed(self, tokens: int) -> "LactState | None":
        """Where no chunk ends within these tokens; before any branch token."""
        entries = range(len(self.where))
        if self.own is not None or max(self.open(entry) for entry in entries) + tokens > self.chunk:
            return None
        begun = [(0, 0, 0) for _ in entries]  # as for any other place
        where = [(0, entry) for entry in entries]
        low = self.used().to(self.prefix[0].dtype)  # as they are read, once for all tokens
        return replace(self, weights=[], where=where, chunks=[], begun=begun, gathered=low)

    def used(self) -> Tensor:
        """The weights that each entry reads, [P, H, 3, I, D]."""
        if self.gathered is not None:
            return self.gathered
        return pick([w.used for w in self.weights], self.where)

    def open(self, entry: int) -> int:
        """Tokens in the open chunk."""
        return self.begun[entry][2] + self.fresh[entry]

    def updated(self, own: Tokens, ends: list[int], initial: Callable[[], Tensor], rule: Rule) -> "LactState":
        """The state with the weights of all entries whose open chunk is full updated.

        own: t tokens of M sequences, of which ends[entry] count. The branches of an entry part here: each has its own
        weights.
        """
        full = [entry for entry in range(len(self.where)) if self.open(entry) == rule.chunk]
        if not full:
            return self
        each = own.x.shape[0] // len(self.where)
        wide = self.spread(each)
        ends = [end for end in ends for _ in range(each)]
        members = [entry * each + i for entry in full for i in range(each)]
        tokens = _stack([wide._open_tokens(m, own, ends[m]) for m in members])
        found = after(_gather(wide.weights, [wide.where[m] for m in members]), tokens, initial(), rule)
        weights = [*wide.weights, found]
        where, begun, fresh = list(wide.where), list(wide.begun), list(wide.fresh)
        for row, m in enumerate(members):
            where[m], begun[m], fresh[m] = (len(weights) - 1, row), (0, 0, 0), 0
        return replace(wide, weights=weights, where=where, begun=begun, fresh=fresh)._without_unused()

    def spread(self, n: int) -> "LactState":
        """Every entry n times: one for each sequence that it serves."""
        repeated = {name: [x for x in getattr(self, name) for _ in range(n)] for name in _LISTS}
        return replace(self, gathered=None, **repeated)  # type: ignore[arg-type]

    def _open_tokens(self, member: int, own: Tokens, end: int) -> Tokens:
        chunk, row, count = self.begun[member]
        rows, fresh = slice(member, member + 1), slice(end - self.fresh[member], end)
        parts = [self.chunks[chunk].part(slice(row, row + 1), slice(count))] if count else []
        return join([*parts, own.part(rows, fresh)]) if self.fresh[member] else parts[0]

    def _without_unused(self) -> "LactState":
        kept = sorted({index for index, _ in self.where})
        place = {index: i for i, index in enumerate(kept)}
        where = [(place[index], row) for index, row in self.where]
        return replace(self, weights=[self.weights[index] for index in kept], where=where)


_LISTS = ("where", "begun", "fresh")


def _gather(weights: list[Weights], where: list[tuple[int, int]]) -> Weights:
    """Rows of several as one of [len(where), ...]."""
    rows = [weights[index].rows(slice(row, row + 1)) for index, row in where]
    columns = zip(*(vars(r).values() for r in rows), strict=True)
    return Weights(*(torch.cat(column) for column in columns))


def _stack(parts: list[Tokens]) -> Tokens:
    """Sequences of equal length, one below the other."""
    columns = zip(*(vars(p).values() for p in parts), strict=True)
    return Tokens(*(None if c[0] is None else torch.cat(c) for c in columns))  # type: ignore[arg-type]
