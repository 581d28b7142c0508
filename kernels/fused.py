"""Chains of elementwise operations as one kernel of a GPU."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_refine.platform.hardware import on_gpu

F = TypeVar("F", bound=Callable[..., Any])


def fused(function: F) -> F:
    """Compiled by torch where a tensor among the arguments lies on a GPU; the function as it is elsewhere.

    On a CPU it would need a C++ compiler, and the few large operations of ours gain nothing.
    """

    @functools.cache
    def compiled() -> Callable[..., Any]:
        # one of the main stream, of branches and of single tokens, each with and without gradients
        torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
        return torch.compile(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        gpu = any(isinstance(x, Tensor) and on_gpu(x) for x in args)
        if not gpu or torch.compiler.is_compiling():  # part of the kernel of the caller
            return function(*args, **kwargs)
        return compiled()(*args, **kwargs)

    return call  # type: ignore[return-value]
