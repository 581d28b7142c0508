"""A configuration's kernels on a GPU: each pass at its size, every candidate timed by the autotuners."""

from typing import Any

from megatron_refine.config import Config, ConfigError
from megatron_refine.kernels import tuning
from megatron_refine.platform import hardware
from megatron_refine.platform.megatron.install import install
from megatron_refine.warm.choose import versions
from megatron_refine.warm.passes import passes, shape


def measure(config: Config) -> dict[str, Any]:
    """The fastest candidate of each kernel, and its microseconds. Raises ConfigError where there is no GPU."""
    if not hardware.has_gpu():
        raise ConfigError("kernels measure: times kernels on a GPU, and torch sees none; warm needs none")
    install()
    tuning.configure(search=True)
    for run in passes(config, hardware.device()).values():
        run()
    hardware.synchronize()
    return {
        "architecture": hardware.architecture(), "shape": shape(config), "card": hardware.machine(),
        "versions": versions(), "measured": chosen(),
    }  # fmt: skip


def chosen() -> dict[str, Any]:
    """What the autotuners have chosen so far, kernel by kernel: the candidate of their first pass."""
    found: dict[str, Any] = {}
    for name, tuner in tuning.autotuners().items():
        if tuner.cache:
            best = next(iter(tuner.cache.values()))
            times = getattr(tuner, "configs_timings", {})
            took = round(1e3 * times[best][0], 1) if best in times else None
            found[name] = {"config": tuning.spelled(best), "microseconds": took}
    return found


def table(found: dict[str, Any]) -> str:
    """A line a kernel."""
    rows = {name.rpartition(".")[2]: entry for name, entry in found["measured"].items()}
    width = max(map(len, rows), default=6)
    lines = [f"{found['shape']} on {found['card']}", f"{'kernel':<{width}}  microseconds  configuration"]
    for name, entry in sorted(rows.items()):
        config = " ".join(f"{key}={value}" for key, value in entry["config"].items())
        lines.append(f"{name:<{width}}{entry['microseconds'] or 0:>14.1f}  {config}")
    return "\n".join(lines)
