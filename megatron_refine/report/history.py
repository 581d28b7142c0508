"""Facts of each attempt at a run: logs/attempt_<n>/config.yaml and attempt.json."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_refine import __version__
from megatron_refine.config import Config
from megatron_refine.files import write, write_json

PACKAGES = ("megatron-core", "transformer-engine", "flash-linear-attention", "triton")
PROJECT = Path(__file__).parents[2]


def keep(folder: Path, config: Config, step: int, ranks: int, changed: Mapping[str, Any]) -> None:
    """Write an attempt's configuration, and its facts: the step at which it began, ranks, layout, versions, commit.

    changed: keys of the training that are not as they were before, each with [new, old].
    """
    write(folder / "config.yaml", config.to_yaml())
    facts = {
        "step": step,
        "ranks": ranks,
        "layout": config.parallel.model_dump() | {"dp": ranks // config.parallel.model_size},
        "changed": dict(changed),
        "versions": versions(),
        "commit": commit(PROJECT),
    }
    write_json(folder / "attempt.json", facts)


def versions() -> dict[str, str]:
    """Return the versions of Python, the project and the packages that it computes with, if they are installed."""
    import torch  # its own word for the build: a wheel's metadata may lack +cpu or +cu130

    found = {"python": platform.python_version(), "megatron_refine": __version__, "torch": torch.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit(project: Path) -> str | None:
    """Name the working copy's commit, with -dirty where it was changed; None when installed or without git."""
    if not (project / ".git").exists():  # it may lie in a working copy of something else
        return None
    line = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(line, cwd=project, env=clean, capture_output=True, encoding="utf-8", timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
