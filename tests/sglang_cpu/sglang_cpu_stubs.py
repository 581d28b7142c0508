"""Lets SGLang 0.5.23 start on a machine without a GPU, where some of what it imports cannot be installed.

A .pth file in the environment's site-packages imports this at the start of every process. SGLang imports triton,
torchvision and sgl_kernel whatever the device is; here these names are modules whose every attribute exists and which
compute nothing. No file of SGLang is changed, and no model here calls them: a test that did would fail.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

STUBS = {"triton", "torchvision", "sgl_kernel"}
PROBE = "_is_package_available"  # of transformers: it must hear "not installed", or it imports the stub in earnest
# What SGLang binds when it is imported with a linear-attention model on CPU, by name.
OPS = [
    "fused_gdn_gating_cpu", "fused_moe_router_cpu", "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu", "fused_sigmoid_gating_delta_rule_update_cpu",
    "fused_sigmoid_mul_cpu",
]  # fmt: skip


class Anything(type):
    """A class that takes any argument, and so do its attributes."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class Stub(types.ModuleType):
    """A module, and at once whatever an attribute of it may be: a decorator, a false flag, an empty list."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            members = {"__init__": lambda self, *args, **kwargs: None, "__module__": self.__name__}
            value: Any = Anything(name, (), members)
        else:
            value = sys.modules.get(f"{self.__name__}.{name}") or make(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else lambda function: function

    def __bool__(self) -> bool:
        return False

    def __iter__(self) -> Any:
        return iter(())


def make(name: str) -> Stub:
    module = Stub(name)
    module.__path__ = []  # type: ignore[attr-defined]
    module.__version__ = "0.0"  # type: ignore[attr-defined]
    return module


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> Any:
        if name.partition(".")[0] not in STUBS or asked_by(PROBE):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Stub:
        return make(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__name__ == "sgl_kernel":
            declare_ops()


def asked_by(function: str, depth: int = 8) -> bool:
    frame = sys._getframe(1)
    for _ in range(depth):
        if frame is None or frame.f_back is None:
            return False
        frame = frame.f_back
        if frame.f_code.co_name == function:
            return True
    return False


def declare_ops() -> None:
    """Declare, without an implementation, the operators that SGLang looks up by name."""
    import torch

    global library
    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    for name in OPS:
        if not hasattr(torch.ops.sgl_kernel, name):
            library.define(f"{name}(Tensor x) -> Tensor")


sys.meta_path.insert(0, Finder())
