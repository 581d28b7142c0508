"""Everything the estimate says of a run."""

from dataclasses import dataclass

from megatron_refine.config import Config, check_world_size
from megatron_refine.estimate.flops import StepFlops, step_flops
from megatron_refine.estimate.memory import RankMemory, fullest_rank
from megatron_refine.models import cost


@dataclass(frozen=True)
class Estimate:
    config: Config
    world_size: int
    dp: int  # data parallel size
    parameters: int  # of the whole model
    memory: RankMemory  # of the rank that holds most
    flops: StepFlops  # of one step of the whole batch


def estimate(config: Config, world_size: int) -> Estimate:
    """Parameters, memory and work of a run on `world_size` ranks.

    Raises ConfigError where the ranks do not fit the layout.
    """
    dp = check_world_size(config, world_size)
    parameters = cost.parameters(config.model)
    return Estimate(config, world_size, dp, parameters, fullest_rank(config, dp), step_flops(config))
