"""A GPU that is not there, for Triton: kernels are compiled into TRITON_CACHE_DIR, and their launches do nothing.

The tensors lie on the CPU. What Triton and flash-linear-attention ask of the card (name, capability, shared memory,
processors) is answered from its data sheet. Patches of torch that belong to it stand here, not in platform/: they are
for a process of its own, which computes nothing.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_refine.kernels.tuning import name_of, spelled


@dataclass(frozen=True)
class Card:
    """What a data sheet says."""

    name: str
    capability: tuple[int, int]
    shared: int  # bytes of shared memory that a block may have
    processors: int


CARDS = {
    "sm_80": Card("NVIDIA A100-SXM4-80GB", (8, 0), 166912, 108),
    "sm_90": Card("NVIDIA H100 80GB HBM3", (9, 0), 232448, 132),
}


@dataclass
class Binary:
    """A kernel as it was compiled, or found in the cache."""

    kernel: str  # as in `kernels.tuning.name_of`
    config: dict[str, Any]  # of its autotuner, in words; {} of a kernel without one
    hit: bool  # it lay in the cache
    seconds: float  # of CPU time, that of ptxas included
    shared: int  # bytes of shared memory
    refused: bool  # it wants more than the card has
    registers: int = 0  # a thread; 0 where it was refused
    spilled: int = 0  # bytes a thread that do not fit into registers
    grid: tuple[int, int, int] = (0, 0, 0)  # blocks of its first launch
    kind: str = ""  # the pass that launched it: main, branch or decode


@dataclass
class Compiled:
    """What a process compiled; `claim(key)` says whether a compilation is this process's."""

    claim: Callable[[str], bool]
    tell: Callable[[str], None]  # a kernel's name, as soon as it is compiled
    binaries: list[Binary] = field(default_factory=list)
    kind: str = ""  # the pass under way
    loading: Binary | None = None
    _begun: float = 0.0
    _by_hash: dict[str, Binary] = field(default_factory=dict)

    def hook(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> bool:  # noqa: A002  Triton's name
        """Before a compilation: true where another process does it, and Triton goes on without."""
        mine = self.claim(f"{fn.module}.{fn.name} {compile['key']}")
        self._begun = _cpu_seconds()
        return not mine

    def listen(self, *, src: Any, metadata: dict[str, Any], cache_hit: bool, **_: Any) -> None:
        """After it."""
        seconds, shared = _cpu_seconds() - self._begun, metadata["shared"]
        binary = Binary(name_of(src.fn.fn), _config(src, metadata), cache_hit, seconds, shared, False, kind=self.kind)
        self.binaries.append(binary)
        self._by_hash[metadata["hash"]] = binary
        self.tell(binary.kernel)

    def load(self, hash: str) -> Binary:  # noqa: A002  Triton's name
        """Before a binary is loaded: at its first launch, and again at each if the card refuses it."""
        self.loading = self._by_hash[hash]
        return self.loading


def _cpu_seconds() -> float:
    """Of this process and of those that it waited for: a busy machine does not stretch it."""
    return sum(os.times()[:4])


def _config(src: Any, metadata: dict[str, Any]) -> dict[str, Any]:
    """The candidate of the kernel's autotuner that this is, in words; {} without an autotuner."""
    from megatron_refine.kernels.tuning import autotuners

    tuner = autotuners().get(name_of(src.fn.fn))
    if tuner is None:
        return {}
    constants = {src.fn.arg_names[k[0] if isinstance(k, tuple) else k]: v for k, v in src.constants.items()}
    given = constants | {"num_warps": metadata["num_warps"], "num_stages": metadata["num_stages"]}
    return {name: given[name] for name in spelled(tuner.configs[0])}


class Utilities:
    """Triton's questions to the device."""

    def __init__(self, card: Card, compiled: Compiled):
        self._card, self._compiled = card, compiled

    def get_device_properties(self, _device: int) -> dict[str, int]:
        return {
            "max_shared_mem": self._card.shared, "max_num_regs": 65536, "warpSize": 32,
            "multiprocessor_count": self._card.processors, "sm_clock_rate": 0, "mem_clock_rate": 0, "mem_bus_width": 0,
        }  # fmt: skip

    def load_binary(self, _name: str, kernel: bytes, _shared: int, _device: int) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spilled bytes, most threads a block."""
        registers, spilled = usage(kernel)
        binary = self._compiled.loading
        assert binary
        binary.registers, binary.spilled = registers, spilled
        return 1, 1, registers, spilled, 1024

    def __getattr__(self, name: str) -> Any:
        """The rest is that of the real driver, which is compiled on the way, as a run on a GPU needs it."""
        from triton.backends.nvidia.driver import CudaUtils

        return getattr(CudaUtils(), name)


def usage(kernel: bytes) -> tuple[int, int]:
    """Registers and bytes of stack a thread, by the cuobjdump that comes with Triton."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel)
        file.flush()
        line = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(line, capture_output=True, encoding="utf-8", check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def make_driver(card: Card, compiled: Compiled, launchers: bool) -> Any:
    """Triton's driver for the card. launchers: compile those too, which need a C compiler."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.backends.nvidia.driver import CudaLauncher, ty_to_cpp

    class Driver(DriverBase):
        def __init__(self) -> None:
            self.utils = Utilities(card, compiled)

        def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
            if launchers:
                CudaLauncher(src, metadata)
            binary = compiled.load(metadata.hash)
            binary.refused = metadata.shared > card.shared

            def launch(x: int, y: int, z: int, *_: Any) -> None:
                binary.grid = binary.grid if any(binary.grid) else (x, y, z)

            return launch

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return str(ty_to_cpp(ty))

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 10 * card.capability[0] + card.capability[1], 32)

        def get_device_capability(self, _device: int = 0) -> tuple[int, int]:
            return card.capability

        def get_current_device(self) -> int:
            return 0

        def set_current_device(self, _device: int) -> None:
            pass

        def get_current_stream(self, _device: int = 0) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_benchmarker(self) -> Callable[..., Sequence[float]]:
            return _compile_only

    return Driver()


def _compile_only(kernel_call: Callable[[], object], **_: Any) -> list[float]:
    """In place of timing a candidate. What wants more than the card has raises, as on a card."""
    kernel_call()
    return [1.0, 1.0, 1.0]


def pretend(architecture: str, compiled: Compiled) -> None:
    """Make this process one with such a GPU, for Triton and flash-linear-attention, before the latter is imported."""
    from triton import knobs
    from triton.runtime import driver

    card, compiler = CARDS[architecture], bool(shutil.which("gcc") or shutil.which("clang"))
    if compiler:
        _link_to_nothing()
    driver.set_active(make_driver(card, compiled, compiler))
    knobs.runtime.jit_cache_hook, knobs.compilation.listener = compiled.hook, compiled.listen
    torch.cuda.get_device_name = lambda *_: card.name
    torch.cuda.get_device_capability = lambda *_: card.capability
    torch.cuda.device_count = lambda: 1
    from fla import utils

    home = sys.modules[utils.check_shared_mem.__wrapped__.__module__]
    home.get_all_max_shared_mem = lambda: _Everywhere([card.shared])  # type: ignore[attr-defined]
    utils.check_shared_mem.cache_clear()


class _Everywhere(list[int]):
    """The card's shared memory, whatever index a tensor's device has: one on the CPU has none."""

    def __getitem__(self, _index: Any) -> Any:
        return super().__getitem__(0)


def _link_to_nothing() -> None:
    """Stand in for libcuda.so.1, against which Triton links its launchers: the functions that they name, empty."""
    from triton import knobs
    from triton.backends import nvidia

    sources = [path.read_text(encoding="utf-8") for path in Path(nvidia.__file__).parent.glob("driver.*")]
    names = sorted(set(re.findall(r"\bcu[A-Z]\w+", "\n".join(sources))))
    folder = Path(tempfile.mkdtemp(prefix="libcuda-"))
    library, source = folder / "libcuda.so.1", folder / "empty.c"
    source.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in names), encoding="utf-8")
    compiler = shutil.which("gcc") or shutil.which("clang")
    assert compiler
    line = [compiler, "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)]
    subprocess.run(line, check=True)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)  # a launcher that is loaded finds it by its name
    knobs.nvidia.libcuda_path = str(folder)
