"""What the steps of a configuration launch of Triton's kernels: the passes of one layer, with this rank's heads.

main     the main stream, forward and backward, and states read inside of it (NTP, scoring, packed update)
branch   the rows of rollouts from forked states, forward and backward
decode   a token of each rollout, and rescoring without gradient: the recurrent kernel
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_refine.config import Config
from megatron_refine.kernels.places import Places
from megatron_refine.kernels.tuning import shape_name
from megatron_refine.models.cost import operations

KINDS = ("main", "branch", "decode")
LENGTH = 4096  # longer streams launch more blocks of the same kernels


def shape(config: Config) -> str:
    """The shape that tables know the mixers' kernels by; "" where a family has no Triton kernels."""
    rule = delta_rule(config)
    return shape_name(rule.key_dim, rule.value_dim, rule.gated_rule) if rule else ""


def delta_rule(config: Config) -> Any:
    """Return the shape (`DeltaCost`) of the model's delta rule; None where there is none."""
    return next(iter(operations(config.model).get("delta_rule", [])), None)


def passes(config: Config, device: torch.device) -> dict[str, Callable[[], object]]:
    """A pass of each kind: it computes nothing of use, and needs no more than its kernels."""
    r, sequences, length = config.refine, config.train.micro_batch_size, min(config.data.seq_length, LENGTH)
    positions = sequences * r.num_chunks
    branches = positions * r.num_rollouts

    def mixed(count: int, tokens: int, states: int, later: bool) -> tuple[Tensor, Any]:
        return _mixed(config, device, count, tokens, states, later)

    def main() -> None:
        out, trace = mixed(sequences, length, sequences, later=False)
        at = torch.linspace(1, length, r.num_chunks, device=device).long()
        (out + trace.state_at(Places.of_each(at.expand(sequences, -1))).sum()).backward()

    def branch() -> None:
        mixed(branches, r.rollout_len, positions, later=True)[0].backward()

    @torch.no_grad()
    def decode() -> None:
        for tokens in (1, r.rollout_len):
            mixed(branches, tokens, positions, later=True)

    return dict(zip(KINDS, (main, branch, decode), strict=True)) if shape(config) else {}


def _mixed(
    config: Config, device: torch.device, count: int, tokens: int, states: int, later: bool
) -> tuple[Tensor, Any]:
    """The convolution and the delta rule of `count` sequences of `tokens` from `states` start states; later: behind
    other tokens. Returns a sum of what comes out, and the trace."""
    from megatron_refine.kernels.delta_rule.fla import fla_delta_rule
    from megatron_refine.kernels.short_conv.gpu import gpu_convolved

    rule = delta_rule(config)
    shards = config.parallel.tp * config.parallel.cp
    size: dict[str, Any] = {"device": device, "requires_grad": True}
    low: dict[str, Any] = {"dtype": getattr(torch, config.train.dtype), **size}
    heads, groups = rule.heads // shards, rule.keys // rule.key_dim // shards
    channels, others = (columns // shards // groups for columns in (rule.channels, rule.others))
    rows = torch.randn(count, tokens, groups, channels + others, **low)
    tail = torch.randn(count, rule.conv_size - 1, groups, channels, **low) if later else None
    weight = torch.randn(groups, channels, rule.conv_size, **low)
    q, k, v, _ = gpu_convolved(rows, weight, tail, rule.key_dim, [others])
    beta = torch.rand(count, tokens, heads, **size)
    g = -torch.rand(count, tokens, heads, **size) if rule.gated_rule else None
    state = torch.zeros(states, heads, rule.key_dim, rule.value_dim, **size)
    o, final, trace = fla_delta_rule(q, k, v.reshape(count, tokens, heads, rule.value_dim), beta, g, state)
    return o.float().sum() + final.sum(), trace
