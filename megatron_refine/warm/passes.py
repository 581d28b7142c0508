"""What the steps of a configuration launch of Triton's kernels: the passes of one layer, with this rank's heads.

main     the main stream, forward and backward, and states read inside of it (NTP, scoring, packed update)
branch   the rows of rollouts from forked states, forward and backward
decode   a token of each rollout, and rescoring without gradient: the recurrent kernel
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_refine.config import Config
from megatron_refine.kernels.places import Places
from megatron_refine.kernels.tuning import shape_name
from megatron_refine.models import family

KINDS = ("main", "branch", "decode")
LENGTH = 4096  # longer streams launch more blocks of the same kernels


def shape(config: Config) -> str:
    """The shape that tables know the mixers' kernels by; "" where a family has no Triton kernels."""
    rule = family.flops(config.model.family).delta_rule(config.model)
    return shape_name(rule.key_dim, rule.value_dim, rule.gated_rule) if rule else ""


def passes(config: Config, device: torch.device) -> dict[str, Callable[[], object]]:
    """A pass of each kind: it computes nothing of use, and needs no more than its kernels."""
    from megatron_refine.kernels.delta_rule.fla import fla_delta_rule

    r, sequences, length = config.refine, config.train.micro_batch_size, min(config.data.seq_length, LENGTH)
    positions = sequences * r.num_chunks
    branches = positions * r.num_rollouts

    def inputs(count: int, tokens: int, states: int, grad: bool) -> dict[str, Tensor]:
        return _inputs(config, device, count, tokens, states, grad)

    def main() -> None:
        o, final, trace = fla_delta_rule(**inputs(sequences, length, sequences, True))
        at = torch.linspace(1, length, r.num_chunks, device=device).long()
        read = trace.state_at(Places.of_each(at.expand(sequences, -1)))
        (o.float().sum() + final.sum() + read.sum()).backward()

    def branch() -> None:
        o, final, _ = fla_delta_rule(**inputs(branches, r.rollout_len, positions, True))
        (o.float().sum() + final.sum()).backward()

    @torch.no_grad()
    def decode() -> None:
        for tokens in (1, r.rollout_len):
            fla_delta_rule(**inputs(branches, tokens, positions, False))

    return dict(zip(KINDS, (main, branch, decode), strict=True)) if shape(config) else {}


def _inputs(
    config: Config, device: torch.device, count: int, tokens: int, states: int, grad: bool
) -> dict[str, Tensor]:
    """Arguments of `fla_delta_rule`: `count` sequences of `tokens` from `states` start states."""
    rule = family.flops(config.model.family).delta_rule(config.model)
    shards = config.parallel.tp * config.parallel.cp
    heads, groups = rule.heads // shards, rule.keys // rule.key_dim // shards
    low = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    rows = (count, tokens, heads)
    made = {
        "q": torch.randn(count, tokens, groups, rule.key_dim, dtype=low, device=device) * rule.key_dim**-0.5,
        "k": torch.randn(count, tokens, groups, rule.key_dim, dtype=low, device=device) * rule.key_dim**-0.5,
        "v": torch.randn(*rows, rule.value_dim, dtype=low, device=device),
        "beta": torch.rand(rows, device=device),
        "state": torch.zeros(states, heads, rule.key_dim, rule.value_dim, device=device),
    }
    if rule.gated_rule:
        made["g"] = -torch.rand(rows, device=device)
    return {name: x.requires_grad_(grad) for name, x in made.items()}
