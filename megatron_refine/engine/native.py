"""Rollouts by forking the trainer's own model: no second copy of the weights, no second pass over the prefix."""

import warnings

import torch
from torch import Tensor, nn

from megatron_refine.engine.decode import DecodeGraphs, Group, decode, decode_across_stages, fixed
from megatron_refine.records import Fork, RolloutRequest, Rollouts
from megatron_refine.trainer.model import unwrap
from megatron_refine.trainer.random import ROLLOUT, uniform


class NativeEngine:
    """All branches of a micro-batch decode as one batch from their forked states. Needs `request.fork`."""

    def __init__(self, model: nn.Module, cuda_graphs: bool = False, required: bool = False):
        """cuda_graphs: record what is decoded; without `required`, decode step by step where that fails."""
        self.model, self._required = model, required
        self._graphs = DecodeGraphs(model) if cuda_graphs else None
        self.weight_version = 0

    def sync(self, weight_version: int) -> None:
        """The weights are the trainer's own: nothing to move."""
        self.weight_version = weight_version

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        """Nothing was started."""

    @torch.no_grad()
    def rollout(self, request: RolloutRequest) -> Rollouts:
        assert request.fork is not None, "the native engine decodes from forked states"
        n = request.num_rollouts
        shape = (*request.positions.shape, n)  # [B, c, n]
        samples, positions = request.sample_ids[:, None, None], request.positions[..., None]
        # two chunks may start at one position: the rollouts of a sequence are counted over all of its chunks
        rollouts = torch.arange(positions.shape[1] * n, device=positions.device).view(-1, n)
        places = torch.arange(request.rollout_len, device=positions.device).view(-1, 1, 1, 1)
        draws = uniform(request.seed, ROLLOUT, request.step, samples, positions, rollouts, places)  # [k, B, c, n]
        tokens, logprobs = self._decode(request.fork, draws.flatten(1, 2), request.temperature, request.banned)
        return Rollouts(tokens.T.reshape(*shape, -1), logprobs.T.reshape(*shape, -1), self.weight_version)

    def _decode(
        self, fork: Fork, draws: Tensor, temperature: float, banned: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """draws [k, P, n] -> tokens, log-probabilities [k, P * n]."""
        stages = unwrap(self.model).pg_collection.pp.size()
        if stages == 1:
            given = _group(fork, draws, slice(None))
            return self._on_one_stage(given, temperature, banned)
        size = -(-draws.shape[1] // stages)
        parts = [slice(start, start + size) for start in range(0, draws.shape[1], size)]
        groups = [_group(fork, draws, part) for part in parts]
        found = decode_across_stages(self.model, groups, temperature, banned)
        tokens, logprobs = zip(*found, strict=True)
        return torch.cat(tokens, 1), torch.cat(logprobs, 1)

    def _on_one_stage(self, group: Group, temperature: float, banned: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        given = group.hidden, group.draws, temperature, banned
        states = fixed(group.states, len(group.draws) - 1) if self._graphs else None
        if self._graphs is None or states is None:
            return decode(self.model, group.states, *given)
        try:
            return self._graphs(states, *given)
        except RuntimeError as error:
            if self._required:
                raise
            reason = str(error).partition("\n")[0]
            text = "engine.cuda_graphs=auto: decoding cannot be recorded, and goes on step by step"
            warnings.warn(f"{text}: {reason}", stacklevel=2)
            self._graphs = None
            return decode(self.model, group.states, *given)


def _group(fork: Fork, draws: Tensor, part: slice) -> Group:
    """The branches of some of the P positions: draws [k, P, n]."""
    n = draws.shape[-1]
    states = {layer: state.detach().part(part).fork(n) for layer, state in fork.states.items()}
    return Group(states, fork.hidden[part].detach().repeat_interleave(n, 0), draws[:, part].flatten(1))
