"""k tokens of every branch: step by step, or as one CUDA graph, where launching the kernels costs the time."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_refine.platform import hardware
from megatron_refine.trainer import forward
from megatron_refine.trainer.model import unwrap
from megatron_refine.trainer.parallel import from_last_stage
from megatron_refine.trainer.pipeline import Link
from megatron_refine.trainer.rows import Rows, sample


@torch.no_grad()
def decode(
    model: nn.Module, states: dict[int, Any], hidden: Tensor, draws: Tensor, temperature: float,
    banned: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Continue N branches: their states by layer, the rows [N, h] that predict their first tokens, draws [k, N].

    banned: ids that are not drawn, as in `sample`.
    Returns: tokens and log-probabilities [k, N].
    """
    inner = unwrap(model)
    tokens, logprobs = list[Tensor](), list[Tensor]()
    rows = Rows.of(inner, hidden[:, None])
    for j, u in enumerate(draws):
        if j:
            rows, states = forward.decode_step(model, tokens[-1], states)
        token, logprob = sample(inner, rows.span(len(hidden)), u, temperature, banned=banned)
        tokens.append(token)
        logprobs.append(logprob)
    return torch.stack(tokens), torch.stack(logprobs)


@dataclass
class Group:
    """Branches that go through the pipeline together."""

    states: dict[int, Any]
    hidden: Tensor  # [N, h]
    draws: Tensor  # [k, N]


@torch.no_grad()
def decode_across_stages(
    model: nn.Module, groups: Sequence[Group], temperature: float, banned: tuple[int, ...] = ()
) -> list[tuple[Tensor, Tensor]]:
    """`decode` of several groups, as many as there are stages: while one is on a stage, another is on the next.

    The last stage draws a group's tokens and sends them to the first, which embeds them in the group's next turn.
    """
    inner = unwrap(model)
    link, pp = Link(inner), inner.pg_collection.pp
    high = torch.promote_types(inner.config.params_dtype, torch.float32)
    found = [(g.draws.new_zeros(g.draws.shape, dtype=torch.int64), g.draws.to(high)) for g in groups]
    for j in range(len(groups[0].draws)):
        for group, (tokens, logprobs) in zip(groups, found, strict=True):
            rows = Rows.of(inner, group.hidden[:, None])
            if j:
                if link.stage == 0:
                    tokens[j - 1] = link.receive(tokens[j - 1].shape, torch.int64, link.last)
                rows, group.states = forward.decode_step(model, tokens[j - 1], group.states, link)
            if link.stage == link.last:
                held = rows.span(len(group.hidden))
                tokens[j], logprobs[j] = sample(inner, held, group.draws[j], temperature, banned=banned)
                if j < len(tokens) - 1:
                    link.send(tokens[j], 0)
    link.wait()
    return [(from_last_stage(tokens, pp), from_last_stage(logprobs, pp)) for tokens, logprobs in found]


class DecodeGraphs:
    """`decode` of one model, recorded for each shape when it is first asked for.

    A graph reads the parameters where they lay when it was recorded: as training does, change them in place.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._recorded: dict[Any, tuple[list[Tensor], Any, tuple[Tensor, Tensor]]] = {}

    def __call__(
        self, states: dict[int, Any], hidden: Tensor, draws: Tensor, temperature: float, banned: tuple[int, ...] = ()
    ) -> tuple[Tensor, Tensor]:
        """States: `fixed`."""
        given: list[Tensor] = []
        shape = _taken_apart(states, given)
        given += [hidden, draws]
        key = temperature, banned, shape, tuple((tensor.shape, tensor.dtype) for tensor in given)
        if key not in self._recorded:
            self._recorded[key] = self._record(shape, given, temperature, banned)
        own, replay, (tokens, logprobs) = self._recorded[key]
        for mine, theirs in zip(own, given, strict=True):
            mine.copy_(theirs)
        replay()
        return tokens.clone(), logprobs.clone()

    def _record(self, shape: Any, given: list[Tensor], temperature: float, banned: tuple[int, ...]) -> Any:
        own = [tensor.clone() for tensor in given]
        *left, hidden, draws = own
        kept = _put_together(shape, iter(left))
        replay, found = hardware.record(lambda: decode(self.model, kept, hidden, draws, temperature, banned))
        return own, replay, found


def fixed(states: dict[int, Any], tokens: int) -> dict[int, Any] | None:
    """The states for a recording that feeds `tokens` tokens; None where one of them has to be decoded step by step."""
    found = {layer: state.fixed(tokens) for layer, state in states.items()}
    return None if None in found.values() else found


_TENSOR = object()


def _taken_apart(value: Any, tensors: list[Tensor]) -> Any:
    """What is left of a value whose tensors are appended to a list: hashable."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return _TENSOR
    if isinstance(value, dict):
        return dict, tuple(value), tuple(_taken_apart(x, tensors) for x in value.values())
    if isinstance(value, list | tuple):
        return type(value), (), tuple(_taken_apart(x, tensors) for x in value)
    if dataclasses.is_dataclass(value):
        names = tuple(field.name for field in dataclasses.fields(value))
        return type(value), names, tuple(_taken_apart(getattr(value, name), tensors) for name in names)
    return value


def _put_together(left: Any, tensors: Iterator[Tensor]) -> Any:
    """The inverse."""
    if left is _TENSOR:
        return next(tensors)
    if not isinstance(left, tuple):
        return left
    kind, names, parts = left
    values = [_put_together(part, tensors) for part in parts]
    if kind in (list, tuple):
        return kind(values)
    named = dict(zip(names, values, strict=True))
    return named if kind is dict else kind(**named)
