"""A scaling sweep: one run for each number of ranks and layout, from one YAML file."""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from megatron_refine.config import Config, ConfigError, Section, check_world_size, load, read_as
from megatron_refine.config.paths import FilePaths, RequiredPath
from megatron_refine.config.words import settle_points, spell
from megatron_refine.models.family import FAMILIES

RANKS = "ranks"
Values = dict[str, Any]


class Sweep(Section):
    """The keys of the file. Paths are relative to the working directory."""

    config: FilePaths = Field(min_length=1, description="configuration files of every run; later ones win")
    out: RequiredPath = Field(description="folder of the runs and of the results")
    mode: Literal["strong", "weak"] = Field(
        "strong", description="strong: the batch stays; weak: train.global_batch_size is that of one replica"
    )
    grid: dict[str, list[Any]] = Field(
        default_factory=dict, description="ranks and keys of the configuration: every combination that is possible"
    )
    points: list[dict[str, Any]] = Field(default_factory=list, description="further points, written out")
    overrides: list[str] = Field(default_factory=list, description="key.sub=value of every run")
    warm_up: int = Field(2, ge=0, description="first steps of a run that the results leave out")
    timeout_minutes: float = Field(60.0, gt=0, description="of a run on this machine")


@dataclass(frozen=True)
class Point:
    name: str
    ranks: int
    series: str  # what it shares with the points that it is compared with: all but the number of ranks
    folder: Path
    overrides: list[str]
    config: Config
    dp: int


def read_sweep(path: Path) -> Sweep:
    """Raises ConfigError."""
    return read_as(path, Sweep)


def points(sweep: Sweep, path: Path) -> tuple[list[Point], list[str]]:
    """The points, and of the grid's combinations that cannot be a line each.

    Raises ConfigError where a point that is written out cannot be, two are the same, or there are none.
    """
    if not sweep.grid and not sweep.points:
        raise ConfigError(f"{path}: names no points; fill in grid or points")
    found, left_out = list[Point](), list[str]()
    combined = itertools.product(*sweep.grid.values()) if sweep.grid else ()
    grid = [dict(zip(sweep.grid, values, strict=True)) for values in combined]
    for values in settle_points(grid, Config, path):
        try:
            found.append(_point(sweep, values))
        except ConfigError as error:
            left_out.append(f"{_name(values)}: {str(error).splitlines()[0]}")
    for written in settle_points(sweep.points, Config, path):
        try:
            found.append(_point(sweep, written))
        except ConfigError as error:
            raise ConfigError(f"{path}: points: {_name(written)}: {error}") from None
    names = [point.name for point in found]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ConfigError(f"{path}: the point {min(twice)} stands twice")
    if not found:
        raise ConfigError("\n".join([f"{path}: no point of the grid is possible", *left_out]))
    return sorted(found, key=lambda point: point.ranks), left_out


def _point(sweep: Sweep, values: Values) -> Point:
    ranks = values.get(RANKS, 1)
    if not isinstance(ranks, int) or ranks < 1:
        raise ConfigError(f"ranks={ranks!r}: must be a whole number from 1 on")
    name, folder = _name(values), Path(sweep.out) / _name(values)
    own = [*sweep.overrides, *(f"{key}={spell(value)}" for key, value in values.items() if key != RANKS)]
    config = load(sweep.config, own, FAMILIES)
    dp = max(1, ranks // config.parallel.model_size)
    if sweep.mode == "weak":
        own.append(f"train.global_batch_size={config.train.global_batch_size * dp}")
        if config.update.mini_batch_size:
            own.append(f"update.mini_batch_size={config.update.mini_batch_size * dp}")
    own.append(f"run.dir={folder}")
    config = load(sweep.config, own, FAMILIES)
    series = _name({key: value for key, value in values.items() if key != RANKS}) or "dp"
    return Point(name, ranks, series, folder, own, config, check_world_size(config, ranks))


def _name(values: Mapping[str, Any]) -> str:
    parts = []
    for key, value in values.items():
        last = key.split(".")[-1]
        parts.append(("" if value else "no-") + last if isinstance(value, bool) else f"{last}{value}")
    return re.sub(r"[/$]", "-", "_".join(parts))
