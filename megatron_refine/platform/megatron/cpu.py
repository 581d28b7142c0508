"""A CPU in the place of the GPU that Megatron-Core expects. Nothing in Megatron itself is copied or edited."""

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from megatron_refine.platform.hardware import CPU


def run_well() -> None:
    """Have this process use memory and cores as a rank of a training job should."""
    _keep_freed_memory()
    _run_as_batch()


def stand_in(compiles: bool) -> None:
    """Answer what Megatron asks of a GPU. compiles: whether its fusions are compiled, as on a GPU."""
    _patch_torch()
    if not compiles:
        _patch_megatron_jit()
    from megatron_refine.platform.megatron import streams

    streams.on_cpu()


def _keep_freed_memory() -> None:
    """Let glibc reuse large blocks: by default each large tensor is mapped and cleared by the kernel anew."""
    trim_threshold, mmap_max = -1, -4  # parameters of mallopt(3)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(mmap_max, 0)  # a threshold would not do: glibc's highest is 32 MiB
        libc.mallopt(trim_threshold, -1)  # never give back


def _run_as_batch() -> None:
    """Tell Linux that this is a batch job, so that a woken thread does not push another one of its rank off the core.

    gloo wakes three threads for every exchange. Where ranks fill all cores, they pre-empt one another and the rank that
    everyone waits for sits out a scheduler tick: exchanges take half the time this way.
    """
    if hasattr(os, "SCHED_BATCH"):
        with contextlib.suppress(OSError):  # a sandbox may forbid it; it changes speed alone
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _patch_torch() -> None:
    """Answer Megatron's device literals with the CPU."""
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.current_stream = lambda *args, **kwargs: None  # type: ignore[assignment]  # since 0.17
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    for name in ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    real_type = torch.Tensor.type

    def type_name(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        # Megatron's optimizers sort parameters by the string 'torch.cuda.FloatTensor'
        if dtype is not None:
            return real_type(self, dtype, *args, **kwargs)
        return real_type(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = type_name  # type: ignore[method-assign,assignment]


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)  # there is no pinned allocator without CUDA
        return factory(*args, **kwargs)

    return create


def _patch_megatron_jit() -> None:
    """Leave Megatron's fusions as they are written: it compiles them at import. On a CPU that needs a C++ compiler and
    gains nothing, and Inductor alone takes seconds to import. Where Megatron was imported before, nothing that it has
    decorated is compiled when it is called."""
    if "megatron.core.jit" in sys.modules:
        from torch._dynamo import config

        config.disable = True
        return
    compiled, torch.compile = torch.compile, lambda function: function  # type: ignore[assignment]
    try:
        import megatron.core.jit
    finally:
        torch.compile = compiled
    megatron.core.jit.disable_jit_fuser()
