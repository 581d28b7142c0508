"""CUDA or the CPU, and what a rank may ask of it."""

import contextlib
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

CPU = torch.device("cpu")
GPU_PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
}  # dense bf16, data sheets
_recorder: Callable[[Callable[[], Any]], Any] | None = None  # of `pretend_gpu`


def has_gpu() -> bool:
    return _recorder is not None or torch.cuda.is_available()


def gpus() -> int:
    """Count the GPUs that this process sees."""
    return 0 if _recorder is not None else torch.cuda.device_count()


def on_gpu(tensor: torch.Tensor) -> bool:
    """Tell whether a GPU computes with the tensor."""
    return tensor.device.type == "cuda" or _recorder is not None


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() and _recorder is None else CPU


def pretend_gpu(compiler: Callable[..., Any], recorder: Callable[[Callable[[], Any]], Any]) -> None:
    """Take a GPU's way through the program, on tensors of a CPU that hold no values: to count what it launches. From
    then on this process can do nothing else.

    compiler stands in for torch.compile, recorder for `record`. Call it before Megatron-Core is
    imported.
    """
    global _recorder
    assert "megatron.core" not in sys.modules, "pretend before Megatron-Core is imported"
    _recorder = recorder
    torch.compile = compiler
    from torch._subclasses.fake_tensor import FakeTensor

    del FakeTensor.tolist  # it asks for each value alone; Tensor's own is answered by a mode, as a whole
    # parameters are made where and as they should be, and those without values cannot be moved
    torch.nn.Module._apply = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def backend() -> str:
    """Return the backend of collectives on tensors of `device()`."""
    return "nccl" if device() != CPU else "gloo"


def synchronize() -> None:
    """Wait for the device, so that a wall-clock reading covers the work that was queued."""
    if has_gpu():
        torch.cuda.synchronize()


def moment() -> Any:
    """Now, where the device stands in its work once it comes to it: for `seconds_between`."""
    if not has_gpu():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(first: Any, last: Any) -> float:
    """Return the seconds between two moments that the device has passed: `synchronize` before."""
    return 1e-3 * first.elapsed_time(last) if has_gpu() else last - first


def record(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """A CUDA graph of what `run` launches: what replays it, and the result, whose tensors every replay fills anew."""
    if _recorder is not None:
        return _recorder(run)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # kernels are chosen, workspaces and communicators made
            run()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        result = run()
    return graph.replay, result


def peak_memory_bytes() -> int:
    """Highest allocated device memory; on CPU the process's highest resident set."""
    if has_gpu():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machine() -> str:
    """This process's machine in words."""
    if has_gpu():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    cores = len(os.sched_getaffinity(0))
    return f"{cores} core{'s' if cores > 1 else ''}, CPU"


def peak_flops() -> float | None:
    """Return dense bf16 FLOP/s of one GPU by its data sheet. None of a GPU that is not listed, and of a CPU, whose
    ranks share cores: a share of a measured peak said 143 % there."""
    name = torch.cuda.get_device_name() if has_gpu() else ""
    return next((flops for key, flops in GPU_PEAK_FLOPS.items() if key in name), None)


def architecture() -> str:
    """Return the GPU's architecture, such as sm_90; "" without one, or where one is pretended."""
    if device() == CPU:
        return ""
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def keep_compiled() -> None:
    """Have Triton and Inductor keep what they compile where a later run finds it, unless the user has named folders.

    Inductor's own default is a temporary folder.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    for variable, name in (("TRITON_CACHE_DIR", "triton"), ("TORCHINDUCTOR_CACHE_DIR", "inductor")):
        folder = os.path.join(home, "megatron_refine", name)
        if not os.environ.get(variable):
            with contextlib.suppress(OSError):  # a home that cannot be written: their own defaults
                os.makedirs(folder, exist_ok=True)
                os.environ[variable] = folder
