"""From what was compiled, or measured, to a table of kernels/tuning."""

import importlib.metadata
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_refine.config import ConfigError
from megatron_refine.files import read_json, write_json
from megatron_refine.kernels import tuning
from megatron_refine.warm.driver import CARDS, Card
from megatron_refine.warm.passes import KINDS
from megatron_refine.warm.run import Row

PACKAGES = ("flash-linear-attention", "triton")
ANNOUNCED = "ops."  # kernels of flash-linear-attention; the convolution's come before a pass is announced
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32  # that an SM has
BUSY = 8  # warps that keep an SM's four tensor cores at work: two each
SCHEDULERS = 4  # of an SM: a warp for each


def compiled_file(architecture: str, shape: str, rows: Sequence[Row]) -> dict[str, Any]:
    """What `warm --json` writes."""
    return {"architecture": architecture, "shape": shape, "versions": versions(), "rows": [*rows]}


def versions() -> dict[str, str]:
    """Of the kernels and of their compiler."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def update(folder: Path, files: Sequence[Path]) -> list[str]:
    """Write what the files of `warm --json` and `measure --json` say into the tables in `folder`, later ones last.

    What was measured is replaced by nothing but another measurement. Returns a line for each table. Raises ConfigError.
    """
    tables: dict[str, dict[str, Any]] = {}
    for file in files:
        found = _read(file)
        name = found["architecture"]
        path = folder / f"{name}.json"
        table = tables.setdefault(name, read_json(path) if path.is_file() else {"shapes": {}})
        table["versions"] = found["versions"]
        _enter(table["shapes"].setdefault(found["shape"], {"kernels": {}, "passes": {}}), found)
    for name, table in tables.items():
        write_json(folder / f"{name}.json", table, indent=1, sort_keys=True)
    return [f"{folder / name}.json: {', '.join(table['shapes'])}" for name, table in tables.items()]


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if {"architecture", "shape", "versions"} <= found.keys() and ("rows" in found or "measured" in found):
            return dict(found)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; name a file that --json wrote") from None
    except (ValueError, AttributeError):
        pass
    raise ConfigError(f"{file}: holds no kernels; name a file that `kernels warm --json` or `kernels measure` wrote")


def _enter(shape: dict[str, Any], found: Mapping[str, Any]) -> None:
    """Enter one file's kernels into its shape of a table."""
    kernels = shape["kernels"]
    for name, entry in found.get("measured", {}).items():
        kernels[name] = {"by": "measured", "on": found["card"], **entry}
    rows = found.get("rows", [])
    for name, config in choose(rows, found["architecture"]).items():
        if kernels.get(name, {}).get("by") != "measured":
            kernels[name] = {"by": "compiled", "config": config}
    for kind in KINDS:
        announced = [row for row in rows if row["kind"] == kind and row["kernel"].startswith(ANNOUNCED)]
        if launched := compilations(announced):
            shape["passes"][kind] = launched


def compilations(rows: Sequence[Row]) -> dict[str, int]:
    """How often one candidate of each kernel was compiled: once for each set of arguments that are constants to it."""
    each = Counter((row["kernel"], json.dumps(row["config"], sort_keys=True)) for row in rows)
    return {name: max(n for (kernel, _), n in each.items() if kernel == name) for name in sorted({k for k, _ in each})}


def choose(rows: Sequence[Row], architecture: str) -> dict[str, tuning.Spelled]:
    """For each kernel with candidates, the one that fits the card, spills least and is predicted to be fastest."""
    card = CARDS[architecture]
    found = {}
    for name in sorted({row["kernel"] for row in rows if row["config"]}):
        candidates: dict[str, list[Row]] = {}
        for row in (r for r in rows if r["kernel"] == name):
            candidates.setdefault(json.dumps(row["config"], sort_keys=True), []).append(row)
        best = min(candidates.values(), key=lambda mine: _cost(mine, card))
        found[name] = best[0]["config"]
    return found


def _cost(mine: Sequence[Row], card: Card) -> tuple[Any, ...]:
    """What a candidate is ranked by: the worst of its passes, and the predicted time of the first, in tenths."""
    first = min(mine, key=lambda row: KINDS.index(row["kind"]))
    warps, stages = first["config"]["num_warps"], first["config"]["num_stages"]
    refused, spilled = any(row["refused"] for row in mine), max(row["spilled"] for row in mine)
    blocks = max(1, math.prod(first["grid"]))
    time = round(math.log(predicted(first, card)), 1)
    return refused, spilled, time, blocks, abs(warps - SCHEDULERS), -stages, first["registers"]


def predicted(row: Row, card: Card) -> float:
    """Relative time of a launch, of candidates that share the same work out to different numbers of blocks.

    The busiest SM takes ceil(blocks / SMs) of them, as many at once as its shared memory, registers and threads allow;
    it is fully at work with BUSY warps. No measurement: docs/gpu.md says how to make one.
    """
    blocks, warps = max(1, math.prod(row["grid"])), row["config"]["num_warps"]
    a_block = max(1, row["registers"]) * 32 * warps
    by_memory = card.shared // row["shared"] if row["shared"] else BLOCKS
    resident = min(by_memory, REGISTERS // a_block, THREADS // (32 * warps), BLOCKS)
    share = math.ceil(blocks / card.processors)
    at_once = max(1, min(share, resident))
    return share / blocks / min(1.0, at_once * warps / BUSY)
