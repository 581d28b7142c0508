"""What a run computes with, in one line: nothing of it is chosen silently."""

import importlib.util
from typing import Any

from megatron_refine import extras
from megatron_refine.config import Config, ModelConfig
from megatron_refine.estimate.memory import recomputed
from megatron_refine.kernels import tuning
from megatron_refine.models import family
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
    if rule := family.flops(model.family).delta_rule(model):
        shape = tuning.shape_name(rule.key_dim, rule.value_dim, rule.gated_rule)
        how = f", configurations {tuning.told(hardware.architecture(), shape)}" if gpu else ""
        return f"delta rule: {f'flash-linear-attention {extras.FLA}' if gpu else 'torch'}{how}"
    flash = importlib.util.find_spec("flash_attn") is not None
    return f"window attention: {('flash-attn' if flash else 'FlexAttention') if gpu else 'torch'}"
