"""Rollouts by forking the trainer's own model: no second copy of the weights, no second pass over the prefix."""

import torch
from torch import nn

from megatron_refine.engine.decode import DecodeGraphs, decode, recordable
from megatron_refine.records import RolloutRequest, Rollouts
from megatron_refine.trainer.random import ROLLOUT, uniform


class NativeEngine:
    """All branches of a micro-batch decode as one batch from their forked states. Needs `request.fork`."""

    def __init__(self, model: nn.Module, cuda_graphs: bool = False):
        self.model = model
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
        states = {layer: state.detach().fork(n) for layer, state in request.fork.states.items()}
        hidden = request.fork.hidden.detach().repeat_interleave(n, 0)
        shape = (*request.positions.shape, n)  # [B, c, n]
        samples, positions = request.sample_ids[:, None, None], request.positions[..., None]
        # two chunks may start at one position: the rollouts of a sequence are counted over all of its chunks
        rollouts = torch.arange(positions.shape[1] * n, device=positions.device).view(-1, n)
        places = torch.arange(request.rollout_len, device=positions.device).view(-1, 1, 1, 1)
        draws = uniform(request.seed, ROLLOUT, request.step, samples, positions, rollouts, places)  # [k, B, c, n]
        given = states, hidden, draws.flatten(1), request.temperature
        graphs = self._graphs if recordable(states) else None
        tokens, logprobs = graphs(*given) if graphs else decode(self.model, *given)
        return Rollouts(tokens.T.reshape(*shape, -1), logprobs.T.reshape(*shape, -1), self.weight_version)
