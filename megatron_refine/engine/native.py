"""Rollouts by forking the trainer's own model: no second copy of the weights, no second pass over the prefix."""

import torch
from torch import nn

from megatron_refine.records import RolloutRequest, Rollouts
from megatron_refine.trainer import forward, head
from megatron_refine.trainer.model import unwrap
from megatron_refine.trainer.random import ROLLOUT, uniform


class NativeEngine:
    """All branches of a micro-batch decode as one batch from their forked states. Needs `request.fork`."""

    def __init__(self, model: nn.Module):
        self.model = model
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
        tokens, logprobs = [], []
        for j, u in enumerate(draws.flatten(1)):
            token, logprob = head.sample(unwrap(self.model), hidden, u, request.temperature)
            tokens.append(token)
            logprobs.append(logprob)
            if j + 1 < request.rollout_len:
                hidden, states = forward.decode_step(self.model, token, states)
        stack = [torch.stack(column, -1).view(*shape, -1) for column in (tokens, logprobs)]
        return Rollouts(stack[0], stack[1], self.weight_version)
