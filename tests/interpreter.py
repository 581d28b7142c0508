"""fla's Triton kernels on a CPU: in Triton's interpreter, which runs them program by program with NumPy."""

import builtins
import functools
import gc
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

MISSING = "needs Triton's interpreter and flash-linear-attention in .venv-kernels: make test-kernels"


def available() -> bool:
    """Whether `make test-kernels` runs this: both packages are on the path, and Triton interprets."""
    found = all(importlib.util.find_spec(name) for name in ("triton", "fla"))
    return found and os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def prepare() -> None:
    """What the interpreter lacks for fla's kernels; each change says what fails without it."""
    _numbers_of_one_element()
    import fla.ops.gated_delta_rule  # noqa: F401

    _one_configuration()
    _loop_indices()


def _numbers_of_one_element() -> None:
    """The interpreter takes int() of arrays of one element, which NumPy refuses from 2.5 on."""
    import triton.runtime.interpreter as interpreter

    first = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> Any:
        out = first(tensor, *scope)
        for name in ("__index__", "__int__"):
            setattr(tensor, name, lambda self: int(self.handle.data.item()))
        return out

    interpreter._patch_lang_tensor = patched


def _one_configuration() -> None:
    """Autotuners time their candidates on a GPU. Of one candidate there is nothing to time."""
    from triton.runtime.autotuner import Autotuner

    for found in gc.get_objects():
        if isinstance(found, Autotuner):
            found.configs = found.configs[:1]


def _loop_indices() -> None:
    """A kernel calls `.to()` of its loop's index: a tensor where it is compiled, an int in the interpreter."""
    import fla.ops.common.chunk_delta_h as module
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def indices(*bounds: Any) -> Iterator[Any]:
        numbers = [b.handle.data.item() if hasattr(b, "handle") else int(getattr(b, "value", b)) for b in bounds]
        for i in builtins.range(*numbers):
            yield tl.tensor(TensorHandle(np.array([i], dtype=np.int32), tl.int32), tl.int32)

    module.range = indices  # type: ignore[attr-defined]


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor, Any]:
    """In the place of `kernels.delta_rule.delta_rule`: fla's kernels in fp16, whatever the model's precision is.

    In bf16 the interpreter's products are wrong, by many orders of magnitude.
    """
    from megatron_refine.kernels.delta_rule.fla import fla_delta_rule

    prepare()
    o, final, trace = fla_delta_rule(q.half(), k.half(), v.half(), beta.half(), g, state)
    return o.to(torch.promote_types(q.dtype, torch.float32)), final, trace
