"""Configurations of flash-linear-attention's Triton kernels: pinned by a table, or searched.

Each kernel comes with candidates (tiles, warps, stages). Its autotuner compiles and times all of them before the
first result, which takes minutes of a first step. A table per architecture, sm_90.json and the like, names one for each
kernel and shape: an autotuner with one candidate has nothing to search. Entries are chosen from what compiled without
spills (`megatron-refine kernels warm`), or measured on a card (`megatron-refine kernels measure`): docs/gpu.md.
"""

import functools
import json
import re
import sys
from pathlib import Path
from typing import Any

from megatron_refine.kernels.tuning.waiting import Waiting
from megatron_refine.platform import hardware

HERE = Path(__file__).parent
PACKAGE = "fla"
Spelled = dict[str, Any]  # a configuration in words: {"BV": 64, "num_warps": 4, "num_stages": 3}

_search = False  # train.autotune
_waiting = Waiting()
_pinned = ""  # the shape that the autotuners are set to
_seen: set[tuple[str, str]] = set()  # shapes and passes whose kernels were announced
_own: dict[str, list[Any]] = {}  # an autotuner's candidates as they came


def configure(search: bool) -> None:
    """Set whether kernels search among all of their candidates from now on, whatever the tables say."""
    global _search, _pinned
    if search != _search:
        _search, _pinned = search, ""
        _seen.clear()


def shape_name(key_dim: int, value_dim: int, gated: bool) -> str:
    """Name what a table tells apart: `K128 V128`, or `K256 V512 gated`."""
    return f"K{key_dim} V{value_dim}{' gated' if gated else ''}"


def ready(key_dim: int, value_dim: int, gated: bool, kind: str) -> None:
    """Set the autotuners to the shape, and have the screen told while the kernels of a pass of this kind compile.

    To be called after flash-linear-attention's import, before each pass: what was done is not done again. kind: main,
    branch or decode.
    """
    shape = shape_name(key_dim, value_dim, gated)
    if (shape, kind) in _seen and shape == _pinned:
        return
    architecture = hardware.architecture()
    if not architecture:
        return
    pin(architecture, shape)
    if (shape, kind) not in _seen:
        _seen.add((shape, kind))
        counts = expected(architecture, shape, kind).items()
        _waiting.expect({name: count * len(_candidates(name)) for name, count in counts})


def pin(architecture: str, shape: str) -> list[str]:
    """Set each autotuner to its one candidate in the table, the others to all of theirs. Returns the names of the set.

    shape: "" for none. A candidate that the autotuner does not have (the table is of another version) is not set.
    """
    global _pinned
    chosen = choices(architecture, shape) if shape and not _search else {}
    found = []
    for name, tuner in autotuners().items():
        own = _own.setdefault(name, list(tuner.configs))
        matching = [candidate for candidate in own if spelled(candidate) == chosen.get(name)]
        tuner.configs = matching or own
        found += [name] if matching else []
    _pinned = shape
    return found


def choices(architecture: str, shape: str) -> dict[str, Spelled]:
    """Each kernel's configuration by the table; {} where there is none for such a shape."""
    kernels = table(architecture)["shapes"].get(_listed(architecture, shape), {}).get("kernels", {})
    return {name: entry["config"] for name, entry in kernels.items()}


def expected(architecture: str, shape: str, kind: str) -> dict[str, int]:
    """How often each kernel of a pass of this kind is compiled, by the table; {} where it does not know the shape."""
    found = table(architecture)["shapes"].get(_listed(architecture, shape), {}).get("passes", {})
    return dict(found.get(kind, {}))


def _listed(architecture: str, shape: str) -> str:
    """The table's shape to take for this one: itself, or the smallest that is nowhere smaller; "" where there is none.

    What fits a card without spills at a larger shape does so at a smaller one.
    """
    key, value, gated = _read(shape)
    larger = [(*_read(name)[:2], name) for name in table(architecture)["shapes"] if _read(name)[2] == gated]
    fitting = [(k * v, name) for k, v, name in larger if k >= key and v >= value]
    return min(fitting)[1] if fitting else ""


def _read(shape: str) -> tuple[int, int, bool]:
    found = re.fullmatch(r"K(\d+) V(\d+)( gated)?", shape)
    assert found, shape
    return int(found[1]), int(found[2]), bool(found[3])


@functools.cache
def table(architecture: str) -> dict[str, Any]:
    """The table of an architecture, such as sm_90: `shapes`, each with `kernels` and `passes`; empty where none is."""
    path = HERE / f"{architecture}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"shapes": {}}


def autotuners() -> dict[str, Any]:
    """Every autotuner in the imported modules of flash-linear-attention, by its kernel's name."""
    from triton.runtime.autotuner import Autotuner, Heuristics

    found: dict[str, Any] = {}
    for module in [m for name, m in list(sys.modules.items()) if name.startswith(f"{PACKAGE}.")]:
        for value in list(vars(module).values()):
            while isinstance(value, Heuristics):
                value = value.fn
            if isinstance(value, Autotuner):
                found[name_of(value.base_fn)] = value
    return found


def name_of(function: Any) -> str:
    """A kernel's name in tables, without that of its package: `ops.common.chunk_o.chunk_fwd_kernel_o`."""
    return f"{function.__module__}.{function.__name__}".partition(".")[2]


def spelled(candidate: Any) -> Spelled:
    """A `triton.Config` in words."""
    return {**candidate.kwargs, "num_warps": candidate.num_warps, "num_stages": candidate.num_stages}


def _candidates(name: str) -> list[Any]:
    tuner = autotuners().get(name)
    return [None] if tuner is None else tuner.configs


def told(architecture: str, shape: str) -> str:
    """How the kernels of a shape get their configurations, in words."""
    if _search:
        return "searched (train.autotune)"
    listed = table(architecture)["shapes"].get(_listed(architecture, shape))
    if not listed:
        return f"searched: none is pinned for {architecture}, {shape}"
    kernels = listed["kernels"].values()
    measured = sum(entry["by"] == "measured" for entry in kernels)
    return f"pinned for {architecture}, {measured} of {len(kernels)} by measurement"
