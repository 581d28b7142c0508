"""The model in any folder that holds one: a run, a checkpoint, or a folder in Hugging Face's format."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_refine.checkpoint.manifest import (
    COMPLETE,
    MANIFEST,
    ORIGIN,
    STEP,
    WEIGHTS_ONLY,
    complete_folders,
    model_in,
    read_manifest,
)
from megatron_refine.config import ConfigError, ModelConfig
from megatron_refine.convert.fields import CONFIG, model_of, read_config

CHECKPOINTS = "checkpoints"  # folder of a run
_WHAT = "a run, a checkpoint or a folder in Hugging Face's format"


@dataclass(frozen=True)
class Source:
    """A model's place and what it is. Found without torch."""

    folder: Path  # the checkpoint, or the folder in Hugging Face's format
    model: ModelConfig
    is_checkpoint: bool
    run: Path | None = None  # the run that wrote the checkpoint

    @property
    def beside(self) -> list[Path]:
        """Folders that may hold what came with the model, its tokenizer for one; the first that has it counts.

        A run may train with another tokenizer than its model came with, so its folder precedes the checkpoint's hf/.
        """
        return [place for place in (self.folder, self.run, self.folder / ORIGIN) if place and place.is_dir()]


def find(path: Path, key: str = "") -> Source:
    """Return the model at `path`: of a run, or of its folder checkpoints/, the newest complete checkpoint.

    key: what named the path, for messages. Raises ConfigError where there is none, CheckpointError where a checkpoint
    is damaged.
    """
    where = f"{key}={path}" if key else str(path)
    if not path.is_dir():
        what = "is a file" if path.exists() else "no such folder"
        raise ConfigError(f"{where}: {what}; name {_WHAT}")
    if (path / COMPLETE).exists():
        return _checkpoint(path)
    if (path / CONFIG).exists():
        return Source(path, model_of(read_config(path), str(path / CONFIG)), is_checkpoint=False)
    steps = complete_folders(path) or complete_folders(path / CHECKPOINTS)
    if steps:
        return _checkpoint(steps[-1])
    if (path / MANIFEST).exists():
        read_manifest(path)  # tells what the checkpoint lacks
    if (path / "config.yaml").exists():
        raise ConfigError(f"{where}: is a run without a checkpoint yet; train it to its first save")
    raise ConfigError(f"{where}: holds no model; name {_WHAT}")


def find_checkpoint(path: Path, key: str) -> Source:
    """`find`, for what only a checkpoint has. Raises ConfigError for a folder in Hugging Face's format."""
    source = find(path, key)
    if not source.is_checkpoint:
        raise ConfigError(f"{key} {path}: is in Hugging Face's format already; name a run or a checkpoint")
    return source


def refuse_existing(target: Path) -> None:
    """Raise ConfigError where there is something already."""
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target}: exists and is not empty; name a new folder")


def differences(source: Source, model: ModelConfig) -> list[str]:
    """Return the overrides that make `model` that of the source; init_std acts at the start only."""
    theirs, ours = source.model.model_dump(), model.model_dump()
    keys = [key for key in theirs if key != "init_std" and theirs[key] != ours.get(key)]
    return [f"model.{key}={theirs[key]}" for key in keys]


def _checkpoint(folder: Path) -> Source:
    manifest = read_manifest(folder)
    converted = manifest.get(WEIGHTS_ONLY) and not re.fullmatch(f"{STEP}[0-9]+", folder.name)  # beside a run's own
    run = folder.parent.parent if folder.parent.name == CHECKPOINTS and not converted else None
    return Source(folder, model_in(folder, manifest), is_checkpoint=True, run=run)
