"""Counts what operators launch and move, as they pass by.

An operator of torch is one launch that reads each tensor it is given once and writes its result once, unless a table
below says otherwise. Views are free. Caches are not modelled: what one kernel writes
and the next one reads is written and read.
"""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PEAK_FLOPS = {torch.bfloat16: 600e12, torch.float16: 600e12, torch.float32: 50e12, torch.float64: 30e12}
BANDWIDTH, LAUNCH = 3e12, 10e-6  # bytes a second; seconds

MATMULS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"}
FREE = {"_unsafe_view", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty", "_local_scalar_dense"}
WRITES = {"fill_", "zero_", "new_zeros", "zeros_like", "new_ones", "ones_like", "full_like", "new_full", "zeros",
          "ones", "full", "arange", "copy_", "_to_copy", "clone"}  # fmt: skip
GATHERS = {"index", "gather", "embedding", "index_select", "index_put_", "index_put", "_index_put_impl_",
           "scatter_add_", "scatter_", "index_add_", "index_copy"}  # fmt: skip
# kernels of an operator, where torch's CUDA implementation has several
SEVERAL = {
    "embedding_dense_backward": 9,  # a sort by token, segments, their sums
    "index_put_": 6, "index_put": 7, "_index_put_impl_": 6,  # accumulating: a sort by index, then the sums
    "select_backward": 2, "slice_backward": 2, "constant_pad_nd": 2, "index_copy": 2,  # zeros or a copy, then the part
    "sort": 4, "cumsum": 2,
}  # fmt: skip
READS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__"}


@dataclass(frozen=True)
class Work:
    """Of one kernel, or of several alike."""

    name: str
    dtype: torch.dtype
    size: float  # bytes read and written
    launches: float = 1
    flops: float = 0.0  # of matrix products
    products: bool = False  # whether it is made of matrix products: its bytes stand apart

    @property
    def seconds(self) -> float:
        """At the peaks, whatever its launch takes: products or memory, whichever is slower."""
        return max(self.flops / PEAK_FLOPS.get(self.dtype, PEAK_FLOPS[torch.float32]), self.size / BANDWIDTH)


@dataclass
class Sum:
    """Of all works of one name, dtype and stage. Linear in them."""

    launches: float = 0.0
    flops: float = 0.0
    size: float = 0.0
    seconds: float = 0.0

    def add(self, other: "Sum | Work", factor: float = 1.0) -> None:
        for name in ("launches", "flops", "size", "seconds"):
            setattr(self, name, getattr(self, name) + factor * getattr(other, name))


Key = tuple[str, str, torch.dtype, bool]
"""Stage, name, dtype, whether it is made of matrix products."""


def moved(tensors: Any) -> int:
    """Bytes of all tensors in it; what is broadcast counts once."""
    total = 0
    for x in tree_leaves(tensors):
        if isinstance(x, Tensor):
            own = (size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)
            total += math.prod(own) * x.element_size()
    return total


class Counter(TorchDispatchMode):
    """Sums by stage, operator and dtype; and the places where the host waited for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: dict[Key, Sum] = {}
        self.reads: list[tuple[str, str]] = []  # stage, place
        self.stages = ["other"]
        self.paused = False  # within what is counted as a whole
        self.replaying = False  # a CUDA graph launches as one
        self._known: dict[int, tuple[Tensor, Any]] = {}  # by storage, which the tensor keeps

    @property
    def stage(self) -> str:
        return self.stages[-1]

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """What happens inside is of this stage, as with a `Clock`."""
        self.stages.append(stage)
        try:
            yield
        finally:
            self.stages.pop()

    def take(self) -> dict[str, float]:
        """As a `Clock`, without seconds."""
        return {}

    def clear(self) -> None:
        self.sums, self.reads = {}, []

    def know(self, tensor: Tensor, values: Any) -> None:
        """Answer reads of `tensor`, or of a view of all of it, with these values."""
        self._known[tensor.untyped_storage()._cdata] = tensor, values

    def read(self, tensor: Tensor, nested: bool, place: str = "") -> Any:
        """The host waits for values: what is known, else zeros of whole numbers and ones of others."""
        self.reads.append((self.stage, place or caller()))
        if (found := self._known.get(tensor.untyped_storage()._cdata)) is not None:
            return shaped(found[1], tensor.shape)
        value = True if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 0
        return filled(tensor.shape, value) if nested else value

    def add(self, work: Work) -> None:
        if self.replaying:
            work = Work(work.name, work.dtype, work.size, 0, work.flops, work.products)
        self.sums.setdefault((self.stage, work.name, work.dtype, work.products), Sum()).add(work)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if func.namespace == "c10d":
            return self._collective(name, func, args, kwargs or {})
        if name == "_local_scalar_dense" and unknown(args[0]):
            return self.read(args[0], nested=False)
        out = func(*args, **(kwargs or {}))
        if self.paused or name in FREE or func.namespace == "prim" or is_view(func):
            return out
        read = args, {key: value for key, value in (kwargs or {}).items() if key != "out"}
        work = operator(name, [x for x in tree_leaves(read) if isinstance(x, Tensor)], out)
        if work is not None:
            self.add(work)
        return out

    def _collective(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Of one rank: nothing travels."""
        from torch._C._distributed_c10d import FakeWork

        done = FakeWork().boxed()
        return (args[0], done) if len(func._schema.returns) > 1 else done


class Answers(TorchFunctionMode):
    """Answers what asks a fake tensor for its values, once for each question, and counts it. Calls other functions in
    the place of those that are one kernel on a GPU alone."""

    def __init__(self, counter: Counter, instead: Mapping[str, Callable[..., Any]]):
        """instead: by name, each given the function and its arguments."""
        super().__init__()
        self.counter, self.instead = counter, instead

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS and unknown(args[0]):
            found = self.counter.read(args[0], nested=name == "tolist")
            return {"__bool__": bool, "__int__": int, "__float__": float, "__index__": int}.get(name, _same)(found)
        if name in self.instead and not self.counter.paused:
            return self.instead[name](func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def unknown(value: Any) -> bool:
    """Whether it is a tensor without values."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(value, FakeTensor) and value.constant is None


def _same(value: Any) -> Any:
    return value


def filled(shape: Sequence[int], value: Any) -> Any:
    """Nested lists of one value."""
    return [filled(shape[1:], value) for _ in range(shape[0])] if shape else value


def shaped(values: Sequence[Any], shape: Sequence[int]) -> Any:
    """A flat list as nested ones."""
    if len(shape) < 2:
        return list(values)
    size = len(values) // shape[0]
    return [shaped(values[i * size : (i + 1) * size], shape[1:]) for i in range(shape[0])]


def caller() -> str:
    """The line of the project that is running, innermost: file:line."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if "megatron_refine" in file and "bench/launches" not in file or "/kernels/" in file or "/models/" in file:
            return f"{file.rsplit('megatron_refine/', 1)[-1]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"


def is_view(func: Any) -> bool:
    """Whether all that the operator returns lies in what it was given, unchanged."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def operator(name: str, given: list[Tensor], out: Any) -> Work | None:
    """What an operator of torch launches and moves; None where no tensor takes part."""
    result = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
    found = [*given, *result]
    if not found:
        return None
    if name in MATMULS:
        left, right = given[-2:]
        flops = 2.0 * result[0].numel() * left.shape[-1]
        return Work(name, left.dtype, moved(given) + moved(result), 1, flops, products=True)
    dtype = next((x.dtype for x in found if x.is_floating_point()), found[0].dtype)
    size = moved(given) + moved(result)
    if name.startswith("_scaled_dot_product"):  # causal: half of the scores; backward five products of two
        flops = 2.0 * given[0].numel() * given[1].shape[-2] * (2.5 if name.endswith("_backward") else 1.0)
        return Work(name, given[0].dtype, size, 1, flops, products=True)
    if name in WRITES:
        size = moved(result) + moved(given[1:] if name == "copy_" else given if name in ("_to_copy", "clone") else [])
    elif name in GATHERS:  # of the larger tensor, the rows that are named alone
        rows = min([moved(x) for x in given if x.is_floating_point()] + [moved(result)])
        size = (2 if name in ("index", "gather", "embedding", "index_select") else 3) * rows
    if name.startswith(("_foreach_", "_fused_adam")):
        return several(name, dtype, given, result)
    return Work(name, dtype, size, launches(name, given))


def launches(name: str, given: list[Tensor]) -> int:
    """Kernels of one call."""
    if name == "cat":
        return -(-len(given) // 128)  # tensors that one kernel takes
    return SEVERAL.get(name, 1)


def several(name: str, dtype: torch.dtype, given: list[Tensor], result: list[Tensor]) -> Work:
    """An operator on lists of tensors: its kernels take many tensors each (ATen's MultiTensorApply.cuh)."""
    if name.startswith("_fused_adam"):
        count = len(given) // 5  # parameters, gradients, two moments, steps
        lists = [given[i * count : (i + 1) * count] for i in range(4)]
        size = 2 * moved(lists) - moved(lists[1])  # gradients are read alone
        return Work(name, dtype, size, packed([x.numel() for x in lists[0]], TENSORS[3]))
    kernels = packed([x.numel() for x in given], TENSORS[0])
    if result:  # one number a tensor: partial sums, and theirs
        return Work(name, dtype, moved(given) + moved(result), 2 * kernels)
    return Work(name, dtype, 2 * moved(given), kernels)


TENSORS = (110, 64, 48, 36, 30)  # of a kernel that reads so many lists
BLOCKS, ELEMENTS = 320, 65536  # of a kernel; of a block


def packed(sizes: Sequence[int], most: int) -> int:
    """Kernels for tensors of these sizes: one is launched when its blocks, or `most` tensors, are full."""
    kernels = blocks = tensors = 0
    for size in sizes:
        tensors += 1
        left = -(-size // ELEMENTS)
        while left:
            taken = min(left, BLOCKS - blocks)
            blocks, left = blocks + taken, left - taken
            if blocks == BLOCKS or (tensors == most and not left):
                kernels, blocks, tensors = kernels + 1, 0, int(left > 0)
    return kernels + (blocks > 0)
