"""What a machine gives a step: versions, and the ceilings that a roofline is made of."""

import hashlib
import importlib.util
import time
from collections.abc import Callable
from typing import Any

from megatron_refine.config import Config
from megatron_refine.platform import hardware

SIDE, COPIED, LAUNCHES = 8192, 1 << 30, 20000  # of a product; fp32 elements; launches
SMALL = 512, 1 << 22, 2000  # on a CPU


def run(config: Config, rounds: int) -> str:
    """The table of this process's machine: TFLOP/s of a bf16 product, TB/s of a copy, microseconds of a launch."""
    import torch

    side, copied, launches = (SIDE, COPIED, LAUNCHES) if hardware.has_gpu() else SMALL
    device = hardware.device()
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    x, small = torch.zeros(copied, device=device), torch.zeros(8, device=device)
    y = torch.empty_like(x)

    def launch() -> None:
        for _ in range(launches):
            small.add_(1)

    product, copy = fastest(lambda: a @ a, rounds), fastest(lambda: y.copy_(x), rounds)
    lines = [f"{name} {version}" for name, version in versions().items()]
    return "\n".join([
        ", ".join([hardware.machine(), *lines]),
        f"product of bf16 {2 * side**3 / product / 1e12:.1f} TFLOP/s ({side} x {side} x {side})",
        f"copy {2 * x.nbytes / copy / 1e12:.3f} TB/s ({x.nbytes / 2**30:.2f} GiB read and written)",
        f"launch {1e6 * fastest(launch, 3) / launches:.1f} us (an operation on 8 elements, launched eagerly)",
    ])  # fmt: skip


def fastest(function: Callable[[], Any], rounds: int) -> float:
    """The least seconds of `rounds`, after two that warm up."""
    found = []
    for i in range(rounds + 2):
        hardware.synchronize()
        start = time.perf_counter()
        function()
        hardware.synchronize()
        found += [time.perf_counter() - start] if i >= 2 else []
    return min(found)


def versions() -> dict[str, str]:
    """Of Python and the packages, and Triton's key: binaries that were compiled under another one are not used."""
    from megatron_refine.report.history import versions as installed

    found = {"architecture": hardware.architecture()} if hardware.has_gpu() else {}
    return found | installed() | ({"triton key": triton_key()} if importlib.util.find_spec("triton") else {})


def triton_key() -> str:
    """Twelve digits of what Triton's cache depends on: its own files, its compiler's, and the version of ptxas."""
    from triton.backends.nvidia.compiler import get_ptxas_version
    from triton.runtime.cache import triton_key as key

    return hashlib.sha256(f"{key()}{get_ptxas_version(90)}".encode()).hexdigest()[:12]
