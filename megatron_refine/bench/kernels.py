"""The mixers' operations, forward and backward: in chunks, and a token after the other."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from megatron_refine.bench.timing import Timings
from megatron_refine.config import Config
from megatron_refine.models.cost import operations


def run(config: Config, rounds: int) -> str:
    """`rounds` of each way on one layer's heads and data.seq_length tokens, on one process. Returns a table a kind of
    layer."""
    import torch

    torch.manual_seed(config.run.seed)

    def timed(function: Callable[[], Any]) -> Callable[[int], None]:
        return lambda _: function().sum().backward()

    tables = []
    for name, costs in operations(config.model).items():
        ways = import_module(f"megatron_refine.kernels.{name}.compare").ways(costs[0], config.data.seq_length)
        timings = Timings({way: timed(function) for way, function in ways.items()}, rounds)
        title = f"{config.model.family} hidden {config.model.hidden_size}, one layer, T {config.data.seq_length}"
        tables.append(f"{title}, forward and backward, fp32; medians of {rounds}\n{timings.table(next(iter(ways)))}")
    return "\n".join(tables)
