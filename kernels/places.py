"""Places in the sequences of a pass, where states are read: known on the device and on the host.

A layer that asked the device where they are would wait until all work before it is done. So a pass asks once, before
its layers; what the layers derive from the places, the first one that needs it makes for all.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunks:
    """The chunks that P places lie in: U of them, each once. A place at the very end lies in the last chunk."""

    on_host: list[tuple[int, int]]  # sequence and number of each
    sequences: Tensor  # [U]
    numbers: Tensor  # [U]
    tokens: Tensor  # [U, C], at most the sequence's last one
    whole: bool  # no chunk reaches beyond the end
    of_place: Tensor | None  # [P] which of them; None: one each, in order
    inside: Tensor  # [P] tokens of the chunk before the place


@dataclass(frozen=True)
class Run:
    """Rows that belong to places of one sequence."""

    sequence: int
    before: Tensor  # [R] tokens before each row's place
    most: int  # of them
    masks: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)  # by the sequence's length


@dataclass(frozen=True)
class Places:
    """P places, each after a number of tokens of one sequence."""

    sequences: Tensor  # [P] int64
    tokens: Tensor  # [P] int64, before the place
    on_host: list[tuple[int, int]]  # the same: sequence and tokens
    _derived: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def read(cls, sequences: Tensor, tokens: Tensor) -> "Places":
        """Of [P], [P] on the device: one read."""
        return cls(sequences, tokens, [(s, t) for s, t in torch.stack([sequences, tokens], 1).tolist()])

    @classmethod
    def of_each(cls, tokens: Tensor) -> "Places":
        """Of [B, c] on the device, c places in each of B sequences: one read."""
        sequences = torch.arange(len(tokens), device=tokens.device).repeat_interleave(tokens.shape[1])
        on_host = [(sequence, count) for sequence, row in enumerate(tokens.tolist()) for count in row]
        return cls(sequences, tokens.flatten(), on_host)

    def part(self, positions: slice) -> "Places":
        """Some of them."""

        def make() -> Places:
            return Places(self.sequences[positions], self.tokens[positions], self.on_host[positions])

        found: Places = self._once(("part", positions.start, positions.stop, positions.step), make)
        return found

    def runs(self, rows: int) -> list[Run]:
        """Consecutive places in one sequence, with `rows` rows a place."""

        def make() -> list[Run]:
            by_sequence = [(sequence, [t for _, t in run]) for sequence, run in groupby(self.on_host, itemgetter(0))]
            before = self.tokens.repeat_interleave(rows).split([len(tokens) * rows for _, tokens in by_sequence])
            return [Run(s, x, max(tokens)) for (s, tokens), x in zip(by_sequence, before, strict=True)]

        found: list[Run] = self._once(("runs", rows), make)
        return found

    def before(self, count: int) -> tuple[Tensor, Tensor]:
        """The `count` tokens before each place: their numbers [P, count], at least 0, and whether there are such."""

        def make() -> tuple[Tensor, Tensor]:
            numbers = self.tokens[:, None] + torch.arange(-count, 0, device=self.tokens.device)
            return numbers.clamp(min=0), numbers >= 0

        found: tuple[Tensor, Tensor] = self._once(("before", count), make)
        return found

    def chunks(self, size: int, length: int) -> Chunks:
        """Of sequences of `length` tokens, cut every `size` tokens."""
        found: Chunks = self._once(("chunks", size, length), lambda: self._chunks(size, length))
        return found

    def _chunks(self, size: int, length: int) -> Chunks:
        last = (length - 1) // size
        lie = [(sequence, min(tokens // size, last)) for sequence, tokens in self.on_host]
        unique = list(dict.fromkeys(lie))
        place = {chunk: i for i, chunk in enumerate(unique)}
        columns = [*(s for s, _ in unique), *(n for _, n in unique), *(place[chunk] for chunk in lie)]
        # one copy to the device
        whole = torch.tensor(columns, device=self.tokens.device)
        sequences, numbers, of_place = whole.split([len(unique), len(unique), len(lie)])
        offsets = torch.arange(min(size, length), device=whole.device)
        return Chunks(
            unique, sequences, numbers,
            tokens=(numbers[:, None] * size + offsets).clamp(max=length - 1),
            whole=all((number + 1) * size <= length for _, number in unique) or length <= size,
            of_place=None if len(unique) == len(lie) else of_place,
            inside=self.tokens - numbers[of_place] * size,
        )  # fmt: skip

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]
