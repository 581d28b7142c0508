"""The points of a sweep: every combination of lists of values, or points that are written out."""

import itertools
import re
from pathlib import Path

from megatron_refine.config import Config, ConfigError
from megatron_refine.config.words import read_yaml, settle_points, spell

LONGEST = 200  # bytes of a folder's name: file systems have 255, and temporary files add to it


def points(path: Path, config: Config) -> list[list[str]]:
    """Return the overrides of each point, with a run folder of its own below config.run.dir.

    The file holds {key: [values]}, a grid, or [{key: value}, ...]. Raises ConfigError with file and remedy.
    """
    tree = read_yaml(path)
    if isinstance(tree, dict) and tree and all(isinstance(values, list) and values for values in tree.values()):
        found = [dict(zip(tree, values, strict=True)) for values in itertools.product(*tree.values())]
    elif isinstance(tree, list) and tree and all(isinstance(point, dict) and point for point in tree):
        found = tree
    else:
        raise ConfigError(f"{path}: a sweep is {{key: [values]}} for a grid, or a list of {{key: value}}")
    found = settle_points(found, type(config), path)
    if any("run.dir" in point for point in found):
        raise ConfigError(f"{path}: run.dir: each point has a folder of its own below the given one; leave it out")
    names = [",".join(f"{key.split('.')[-1]}={spell(value)}" for key, value in point.items()) for point in found]
    names = [re.sub(r"[/$]", "_", name) for name in names]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ConfigError(f"{path}: the point {min(twice)} stands twice; remove one")
    longest = max(names, key=lambda name: len(name.encode()))
    if len(longest.encode()) > LONGEST:
        raise ConfigError(
            f"{path}: the point {longest[:40]}...: its folder would have a name of {len(longest.encode())} bytes, "
            f"{LONGEST} are the most; sweep over shorter values or fewer keys"
        )
    folder = Path(config.run.dir)
    return [
        [*(f"{key}={spell(value)}" for key, value in point.items()), f"run.dir={folder / name}"]
        for name, point in zip(names, found, strict=True)
    ]
