"""What an attention layer knows of the tokens so far: the main stream's keys by reference, and a branch's own."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_refine.kernels.places import Places


@dataclass(frozen=True)
class AttentionState:
    """Of M sequences that continue P places of B streams, P dividing M: each place serves M/P consecutive ones."""

    keys: Tensor  # [B, T, G, d] of the whole streams, normed and turned by position; never copied
    values: Tensor
    places: Places  # P of them
    own: tuple[Tensor, Tensor] | None = None  # keys, values [M, t, G, d] of the tokens since

    @property
    def fed(self) -> int:
        """Own tokens so far, of each sequence."""
        return 0 if self.own is None else self.own[0].shape[1]

    def tensors(self) -> list[Tensor]:
        return [self.keys, self.values]

    def detach(self) -> "AttentionState":
        own = self.own and (self.own[0].detach(), self.own[1].detach())
        return replace(self, keys=self.keys.detach(), values=self.values.detach(), own=own)

    def part(self, positions: slice) -> "AttentionState":
        """Take some of the P places, before any branch token."""
        assert self.own is None
        return replace(self, places=self.places.part(positions))

    def fork(self, n: int) -> "AttentionState":
        """n consecutive copies of each sequence; what they share is not copied."""
        if n == 1 or self.own is None:
            return self
        return replace(self, own=(self.own[0].repeat_interleave(n, 0), self.own[1].repeat_interleave(n, 0)))

    def fixed(self, tokens: int) -> None:
        """Never: a recording copies what it is given, here all keys of the streams, and own rows grow."""

    def fed_with(self, keys: Tensor, values: Tensor) -> "AttentionState":
        """The state after m tokens, keys, values [M n, m, G, d]: each of M sequences, if it has own rows, n times."""
        own = self.fork(len(keys) // len(self.own[0])).own if self.own else None
        if own:
            keys, values = torch.cat([own[0], keys], 1), torch.cat([own[1], values], 1)
        return replace(self, own=(keys, values))
