"""What a run computes with, in one line: nothing of it is chosen silently."""

import importlib.util
from typing import Any

from megatron_refine import platform
from megatron_refine.config import Config
from megatron_refine.estimate.memory import recomputed
from megatron_refine.trainer.layers import linears


def used(config: Config, optimizers: list[Any]) -> str:
    """Such as `bf16, fp32 master weights, torch AdamW; delta rule: torch; linear layers: local; recomputed: mixer`.

    optimizers: of Updater.parts.
    """
    kind = type(optimizers[0].optimizer)
    weights = "bf16, fp32 master weights" if config.train.precision == "bf16" else "fp32"
    again = " and ".join(recomputed(config)) or "nothing"
    return (
        f"{weights}, {kind.__module__.split('.')[0]} {kind.__name__}; {_kernels(config.model.family)}; "
        f"linear layers: {linears(config)}; recomputed: {again}"
    )


def _kernels(family: str) -> str:
    """What mixes a sequence on this machine."""
    gpu = platform.has_gpu()
    if family != "lact":
        return f"delta rule: {'flash-linear-attention' if gpu else 'torch'}"
    flash = importlib.util.find_spec("flash_attn") is not None
    return f"window attention: {('flash-attn' if flash else 'FlexAttention') if gpu else 'torch'}"
