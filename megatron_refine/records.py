"""What flows between the stages of a step, with shapes. A leaf: it imports nothing of the project.

B sequences of T tokens; c positions a sequence, n rollouts a position, k tokens a rollout; P = B * c.
A position p is the number of main tokens before the branch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Sequences as they come from the data."""

    tokens: Tensor  # [B, T] int64, right-padded
    lengths: Tensor  # [B] int64, real tokens
    sample_ids: Tensor  # [B] int64, place in the run's stream of samples, the same at any layout

    def rows(self, index: slice) -> "Batch":
        return Batch(self.tokens[index], self.lengths[index], self.sample_ids[index])

    def to(self, device: Any) -> "Batch":
        return Batch(*(field.to(device) for field in vars(self).values()))


@dataclass(frozen=True)
class Rollouts:
    """What an engine wrote at the selected positions."""

    tokens: Tensor  # [B, c, n, k] int64
    # [B, c, n, k] fp32, the engine's own, at the temperature of the draw (1 for greedy ones): to see how far it is from
    # the trainer, never as old ones
    logprobs: Tensor
    weight_version: int


@dataclass(frozen=True)
class Experience:
    """All that the policy loss needs of scored rollouts; holds no graph."""

    positions: Tensor  # [B, c] int64
    tokens: Tensor  # [B, c, n, k] int64
    old_logprobs: Tensor  # [B, c, n, k] fp32, from the training kernels, at the temperature of the draw
    advantages: Tensor  # [B, c, n] fp32
    weights: Tensor  # [B, c, n, k] fp32, of tokens in the loss, for the engine's mismatch; 0: masked
    usable: Tensor  # [B] bool: false for rows too short for c positions

    def rows(self, index: slice) -> "Experience":
        return Experience(*(field[index] for field in vars(self).values()))


@dataclass(frozen=True)
class Fork:
    """The model's state at the selected positions, for an engine that decodes with the trainer's own model."""

    states: dict[int, Any]  # layer number -> State of P positions
    hidden: Tensor  # [P, hidden] final-norm main rows p-1: they predict the first token


@dataclass(frozen=True)
class RolloutRequest:
    tokens: Tensor  # [B, T]
    positions: Tensor  # [B, c]
    sample_ids: Tensor  # [B]
    num_rollouts: int
    rollout_len: int
    temperature: float  # 0: greedy
    seed: int
    step: int
    fork: Fork | None  # None: the engine prefills the prefixes itself
    banned: tuple[int, ...] = ()  # ids that are never drawn, but count in log-probabilities


@dataclass(frozen=True)
class Output:
    """What a pass in Megatron's schedules leaves on a pipeline stage."""

    main: Tensor | None = None  # [B, T-1], log-probabilities of the main stream; None before the last stage
    branches: Tensor | None = None  # [B, c, n, k], those of the branches, where the pass has any
    hidden: Tensor | None = None  # rows for the next stage; None on the last


class Text(Protocol):
    """The part of a tokenizer that a step uses."""

    ends: tuple[int, ...]  # tokens that end a text

    def decode(self, ids: list[int]) -> str: ...


class RolloutEngine(Protocol):
    """Writes k tokens at each position. The stages know engines by this alone."""

    def rollout(self, request: RolloutRequest) -> Rollouts: ...

    def sync(self, weight_version: int) -> None:
        """Take over the trainer's weights; returns when rollouts come from `weight_version`."""
        ...

    def metrics(self) -> dict[str, float]:
        """The engine/ metrics of a step."""
        ...

    def close(self) -> None:
        """End what the engine started."""
        ...


class LaggingEngine(RolloutEngine, Protocol):
    """One that writes while the trainer goes on."""

    def begin(self, request: RolloutRequest) -> Any:
        """Have rollouts written with the weights that the engine has now; `finish` takes what this returns."""
        ...

    def finish(self, begun: Any, weight_version: int) -> Rollouts:
        """Wait for them. They are of `weight_version`, the trainer's now, only where they had to be written anew."""
        ...


Reward = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""reward(tokens [B,c,n,k], truth [B,c,k], h_pred [B,c,n,k,h], h_true [B,c,k,h]) -> [B,c,n]; with a parameter `decode`
it is given a function from token ids to their text, too"""

Select = Callable[[Tensor, Tensor, int], Tensor]
"""select(entropy [B,T] nats, lengths [B], rollout_len) -> log-weights [B,T] of the index before each start"""
