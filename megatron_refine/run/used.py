"""What a run computes with, in one line: nothing of it is chosen silently."""

from importlib import import_module
from typing import Any

from megatron_refine.config import Config, ModelConfig
from megatron_refine.estimate.memory import recomputed
from megatron_refine.models.cost import operations
from megatron_refine.platform import hardware
from megatron_refine.trainer.layers import linears


def used(config: Config, optimizers: list[Any]) -> str:
    """Such as `bf16, fp32 master weights, torch AdamW; delta rule: torch; linear layers: local; recomputed: mixer`.

    optimizers: of Updater.parts.
    """
    kind = type(optimizers[0].optimizer)
    weights = "bf16, fp32 master weights" if config.train.precision == "bf16" else "fp32"
    again = " and ".join(recomputed(config)) or "nothing"
    return (
        f"{weights}, {kind.__module__.split('.')[0]} {kind.__name__}; {_kernels(config.model)}; "
        f"linear layers: {linears(config)}; recomputed: {again}"
    )


def _kernels(model: ModelConfig) -> str:
    """What mixes a sequence on this machine."""
    gpu = hardware.has_gpu()
    parts = (
        import_module(f"megatron_refine.kernels.{name}").used(costs, gpu) for name, costs in operations(model).items()
    )
    return "; ".join(parts)
