"""All that is changed in torch and Megatron-Core, at once."""

import functools
import os
import sys
import warnings

import torch

from megatron_refine.platform import hardware
from megatron_refine.platform.megatron import cpu
from megatron_refine.platform.rendezvous import local_rank

QUIET = (r"torch\.distributed", r"megatron\.core")  # what they deprecate and what they miss is no news to users


@functools.cache
def install() -> None:
    """Make Megatron-Core usable on this machine, once in a process, before anything of megatron.core is imported."""
    assert "megatron.core" not in sys.modules, "megatron.core was imported before install()"
    unused = sys.modules.setdefault("wandb", None)  # type: ignore[arg-type]  # Megatron imports it, for seconds
    for package in QUIET:
        warnings.filterwarnings("ignore", module=package)
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
