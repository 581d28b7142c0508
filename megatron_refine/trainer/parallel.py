"""Process groups, and where this rank stands in them."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_refine import extras
from megatron_refine.config import Config, check_world_size
from megatron_refine.kernels import tuning
from megatron_refine.models.cost import operations
from megatron_refine.platform import hardware, rendezvous
from megatron_refine.platform.megatron.install import install


@dataclass(frozen=True)
class Ranks:
    """This rank's place in the layout."""

    rank: int
    world: int
    tp_rank: int
    tp: int
    pp_rank: int
    pp: int
    dp_rank: int
    dp: int
    cp_rank: int
    cp: int
    tp_group: Any
    dp_group: Any
    cp_group: Any
    pp_group: Any
    replica_group: Any  # dp * cp: ranks with the same parameters

    @property
    def is_main(self) -> bool:
        """The rank that writes files and the screen."""
        return self.rank == 0

    @property
    def leads_replica(self) -> bool:
        """The first of the ranks that work on the same sequences."""
        return self.tp_rank == self.cp_rank == self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1


def join(config: Config) -> None:
    """Join the default group if there is none. Raises ConfigError where the ranks do not fit the layout, or a GPU lacks
    its kernels."""
    install()
    extras.check_optimizer(config)
    if hardware.architecture() and "delta_rule" in operations(config.model):
        extras.check_fla()
    tuning.configure(config.train.autotune)
    check_world_size(config, dist.get_world_size() if dist.is_initialized() else rendezvous.world_size())
    if not dist.is_initialized():
        rendezvous.init_process_group(config.run.timeout_minutes)


def init_parallel(config: Config) -> Ranks:
    """Join the default group if there is none, build Megatron's groups and random streams. Raises ConfigError where the
    ranks do not fit the layout."""
    join(config)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel = config.parallel
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        context_parallel_size=parallel.cp,
        distributed_timeout_minutes=max(1, round(config.run.timeout_minutes)),
    )
    torch.manual_seed(config.run.seed)
    model_parallel_cuda_manual_seed(config.run.seed, force_reset_rng=True)
    return current_ranks()


def current_ranks() -> Ranks:
    """Read Megatron's parallel state."""
    from megatron.core import parallel_state as ps

    return Ranks(
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        tp_rank=ps.get_tensor_model_parallel_rank(),
        tp=ps.get_tensor_model_parallel_world_size(),
        pp_rank=ps.get_pipeline_model_parallel_rank(),
        pp=ps.get_pipeline_model_parallel_world_size(),
        dp_rank=ps.get_data_parallel_rank(),
        dp=ps.get_data_parallel_world_size(),
        cp_rank=ps.get_context_parallel_rank(),
        cp=ps.get_context_parallel_world_size(),
        tp_group=ps.get_tensor_model_parallel_group(),
        dp_group=ps.get_data_parallel_group(),
        cp_group=ps.get_context_parallel_group(),
        pp_group=ps.get_pipeline_model_parallel_group(),
        replica_group=ps.get_data_parallel_group(with_context_parallel=True),
    )


def from_last_stage(value: Tensor, pp_group: Any) -> Tensor:
    """The last pipeline stage's tensor on every stage (all of one shape)."""
    if pp_group.size() > 1:
        value = value.contiguous()
        dist.broadcast(value, group_src=pp_group.size() - 1, group=pp_group)
    return value


def over_replica(value: Tensor, ranks: Ranks) -> Tensor:
    """What the rank that leads the replica has, on all of its ranks (all of one shape)."""
    value = value.contiguous()
    for group in (ranks.tp_group, ranks.cp_group, ranks.pp_group):
        if group.size() > 1:
            dist.broadcast(value, group_src=0, group=group)
    return value


def sum_over(values: Tensor, group: Any) -> Tensor:
    """Sum over a group's ranks; a new tensor."""
    total = values.clone()
    dist.all_reduce(total, group=group)
    return total
