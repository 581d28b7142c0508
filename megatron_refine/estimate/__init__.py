"""What a run will need, from its configuration and a number of ranks alone: no GPU, no process group, no torch."""

from megatron_refine.estimate.flops import StepFlops, step_flops
from megatron_refine.estimate.memory import RankMemory
from megatron_refine.estimate.table import render
from megatron_refine.estimate.total import Estimate, estimate

__all__ = ["Estimate", "RankMemory", "StepFlops", "estimate", "render", "step_flops"]
