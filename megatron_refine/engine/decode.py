"""k tokens of every branch: step by step, or as one CUDA graph, where launching the kernels costs the time."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from megatron_refine import platform
from megatron_refine.trainer import forward, head
from megatron_refine.trainer.model import unwrap


@torch.no_grad()
def decode(
    model: nn.Module, states: dict[int, Any], hidden: Tensor, draws: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Continue N branches: their states by layer, the rows [N, h] that predict their first tokens, draws [k, N].

    Returns: tokens and log-probabilities [k, N].
    """
    tokens, logprobs = list[Tensor](), list[Tensor]()
    for j, u in enumerate(draws):
        if j:
            hidden, states = forward.decode_step(model, tokens[-1], states)
        token, logprob = head.sample(unwrap(model), hidden, u, temperature)
        tokens.append(token)
        logprobs.append(logprob)
    return torch.stack(tokens), torch.stack(logprobs)


class DecodeGraphs:
    """`decode` of one model, recorded for each shape when it is first asked for.

    A graph reads the parameters where they lay when it was recorded: as training does, change them in place.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._recorded: dict[Any, tuple[list[Tensor], Any, tuple[Tensor, Tensor]]] = {}

    def __call__(
        self, states: dict[int, Any], hidden: Tensor, draws: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        given = [*(tensor for state in states.values() for tensor in state.tensors()), hidden, draws]
        key = temperature, tuple((tensor.shape, tensor.dtype) for tensor in given)
        if key not in self._recorded:
            self._recorded[key] = self._record(states, given, temperature)
        own, replay, (tokens, logprobs) = self._recorded[key]
        for mine, theirs in zip(own, given, strict=True):
            mine.copy_(theirs)
        replay()
        return tokens.clone(), logprobs.clone()

    def _record(self, states: dict[int, Any], given: list[Tensor], temperature: float) -> Any:
        own = [tensor.clone() for tensor in given]
        *left, hidden, draws = own
        kept = {}
        for layer, state in states.items():
            size = len(state.tensors())
            kept[layer], left = type(state)(*left[:size]), left[size:]
        replay, found = platform.record(lambda: decode(self.model, kept, hidden, draws, temperature))
        return own, replay, found


def recordable(states: dict[int, Any]) -> bool:
    """Whether the states are tensors and nothing else: LaCT's depend on positions that Python looks at."""
    return all(len(dataclasses.fields(state)) == len(state.tensors()) for state in states.values())
