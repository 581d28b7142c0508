"""All that is changed in torch and Megatron-Core, at once."""

import functools
import logging
import os
import sys
import warnings

import torch

from megatron_refine.platform import hardware
from megatron_refine.platform.megatron import cpu
from megatron_refine.platform.rendezvous import local_rank

# what they deprecate and what they miss is no news to users: warnings, and since 0.17 lines of the log
QUIET = (r"torch\.distributed", r"megatron\.core")
SILENT = (
    "transformer.transformer_layer",  # that a subclass of its MLP is unknown to it
    "models.gpt.gpt_model", "distributed.distributed_data_parallel", "dist_checkpointing.strategies.common",
    "dist_checkpointing.strategies.torch",
)  # fmt: skip


@functools.cache
def install() -> None:
    """Make Megatron-Core usable on this machine, once in a process, best before megatron.core is imported."""
    unused = sys.modules.setdefault("wandb", None)  # type: ignore[arg-type]  # Megatron imports it, for seconds
    for package in QUIET:
        warnings.filterwarnings("ignore", module=package)
    for name in SILENT:
        logging.getLogger(f"megatron.core.{name}").setLevel(logging.ERROR)
    if hardware.device() != hardware.CPU:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # collectives overlap by the order of launches
        hardware.keep_compiled()
        torch.cuda.set_device(local_rank())
    else:
        cpu.run_well()
        cpu.stand_in(compiles=hardware.has_gpu())
    from megatron_refine.platform.megatron import optimizer

    optimizer.repair()
    if unused is None:
        del sys.modules["wandb"]
