"""CUDA with NCCL, or CPU with gloo: the only file that knows that Megatron-Core expects a GPU.

`install()` must run before anything of megatron.core is imported. With a GPU it only repairs a defect of the
distributed optimizer. Without one it also points Megatron-Core's device literals, RNG tracker and type names at the
CPU; nothing in Megatron itself is copied or edited.
"""

import contextlib
import ctypes
import functools
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

from megatron_refine import launcher

CPU = torch.device("cpu")
GPU_PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
}  # dense bf16, data sheets
_installed = False
_recorder: Callable[[Callable[[], Any]], Any] | None = None  # of `pretend_gpu`
_said = 0  # times that rank 0 spoke


def has_gpu() -> bool:
    return _recorder is not None or torch.cuda.is_available()


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether a GPU computes with the tensor."""
    return tensor.device.type == "cuda" or _recorder is not None


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() and _recorder is None else CPU


def pretend_gpu(compiler: Callable[..., Any], recorder: Callable[[Callable[[], Any]], Any]) -> None:
    """Take a GPU's way through the program, on tensors of a CPU that hold no values: to count what it launches. From
    then on this process can do nothing else.

    compiler stands in for torch.compile, recorder for `record`. Call it before `install`.
    """
    global _recorder
    assert not _installed, "pretend before Megatron-Core is imported"
    _recorder = recorder
    torch.compile = compiler
    from torch._subclasses.fake_tensor import FakeTensor

    del FakeTensor.tolist  # it asks for each value alone; Tensor's own is answered by a mode, as a whole
    # parameters are made where and as they should be, and those without values cannot be moved
    torch.nn.Module._apply = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def install() -> None:
    """Make Megatron-Core importable and usable on this machine. Idempotent."""
    global _installed
    if _installed:
        return
    _installed = True
    unused = sys.modules.setdefault("wandb", None)  # type: ignore[arg-type]  # Megatron imports it where it is, for seconds
    for package in (
        r"torch\.distributed",
        r"megatron\.core",
    ):  # what they deprecate and what they miss is no news to users
        warnings.filterwarnings("ignore", module=package)
    if device() != CPU:
        os.environ.setdefault(
            "CUDA_DEVICE_MAX_CONNECTIONS", "1"
        )  # Megatron overlaps collectives by the order of launches
        torch.cuda.set_device(local_rank())
    else:
        _keep_freed_memory()
        _run_as_batch()
        _patch_torch()
        if not has_gpu():
            _patch_megatron_jit()
        _patch_megatron_rng()
    _repair_distributed_optimizer()
    if unused is None:
        del sys.modules["wandb"]


def global_rank() -> int:
    return launcher.read().rank


def local_rank() -> int:
    return launcher.read().local


def world_size() -> int:
    return launcher.read().world


def init_process_group(timeout_minutes: float) -> None:
    """Join the default group, of the ranks that the launcher has started. Raises LaunchError."""
    place = launcher.read()
    address, port = launcher.meeting(place)
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    timeout = timedelta(minutes=timeout_minutes)
    if not has_gpu():
        torch.set_num_threads(place.threads)
    own_device = device() if device() != CPU else None
    dist.init_process_group(backend(), rank=place.rank, world_size=place.world, timeout=timeout, device_id=own_device)


def from_first(value: str | None) -> str:
    """What rank 0 says; on the others None is given. They wait however long it takes, beyond any deadline of a group.

    Raises RuntimeError where rank 0 is gone.
    """
    global _said
    from torch.distributed import distributed_c10d as c10d

    _said += 1
    store, key = c10d._get_default_store(), f"from_first/{_said}"
    if value is not None:
        store.set(key, value)
        return value
    while not store.check([key]):
        time.sleep(0.1)
    return bytes(store.get(key)).decode()


def backend() -> str:
    """Of collectives on tensors of `device()`."""
    return "nccl" if device() != CPU else "gloo"


class GroupStore:
    """The meeting point of a process group with processes that are no ranks of ours."""

    def __init__(self, address: str, seconds: float, port: int = 0):
        """address: the machine of rank 0 as the others reach it; port: 0 on rank 0, which chooses one; seconds:
        deadline of every operation."""
        self.timeout = timedelta(seconds=seconds)
        self._store = dist.TCPStore(address, port, is_master=not port, timeout=self.timeout, wait_for_workers=False)
        self.port = self._store.port

    def join(self, name: str, world: int, rank: int = 0) -> Any:
        """Waits for the other `world` - 1. Raises RuntimeError in time where they do not come.

        torch offers no public way to make a group outside of the default one; its own new_group uses this helper, and
        so does the other side.
        """
        from torch.distributed import distributed_c10d as c10d

        store = dist.PrefixStore(name, self._store)
        group, _ = c10d._new_process_group_helper(
            world, rank, [], c10d.Backend(backend()), store, group_name=cast(Any, name), timeout=self.timeout
        )
        c10d._world.pg_group_ranks[group] = {i: i for i in range(world)}
        return group


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
    """Of two moments that the device has passed: `synchronize` before."""
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


def rng_state() -> dict[str, Any]:
    """State of every generator that Megatron draws from."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    state = {"cpu": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if has_gpu() else {})


def set_rng_state(state: dict[str, Any]) -> None:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    torch.set_rng_state(state["cpu"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    if has_gpu() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


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
    """Megatron compiles its fusions at import; on CPU that needs a C++ compiler and gains nothing."""
    import megatron.core.jit

    megatron.core.jit.disable_jit_fuser()


def _patch_megatron_rng() -> None:
    """The same named random streams, over the CPU generator."""
    import megatron.core.tensor_parallel.random as random

    class CpuRNGStatesTracker(random.CudaRNGStatesTracker):
        _current_state_name: str

        @contextlib.contextmanager
        def fork(self, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            if name not in self.states_:
                raise ValueError(f"rng state {name} is not added")
            outer, outer_name = torch.get_rng_state(), self._current_state_name
            if outer_name in self.states_:
                self.states_[outer_name] = outer
            torch.set_rng_state(self.states_[name])
            self._current_state_name = name
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(self.states_.get(outer_name, outer))
                self._current_state_name = outer_name

    random.CudaRNGStatesTracker = CpuRNGStatesTracker
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _repair_distributed_optimizer() -> None:
    """Give each parameter its own Adam step when a checkpoint is loaded without TE or apex, on any device.

    Megatron-Core 0.16.1 fails to load `step` of a torch AdamW, and its load_state_dict hands all parameters one shared
    step tensor, which then counts every parameter's update: a silently wrong bias correction after a resume.
    """
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    optimizer = distrib_optimizer.DistributedOptimizer
    original_set, original_load = optimizer._set_main_param_and_optimizer_states, optimizer.load_state_dict

    def set_states(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        step = state.pop("step", None)
        with torch.no_grad():  # the main parameters of an fp32 model are leaves
            original_set(self, model_param, tensors)
        if step is not None:
            fused = self.optimizer.param_groups[group].get("fused")  # counts where the parameter lies
            state["step"] = step.to(next(iter(state.values())).device) if fused else step

    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        original_load(self, state_dict)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].detach().clone()

    optimizer._set_main_param_and_optimizer_states = set_states
    optimizer.load_state_dict = load_state_dict
