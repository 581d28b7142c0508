"""When a checkpoint folder counts: a manifest with every file's hash, and a COMPLETE marker with the manifest's.

A folder is written under a temporary name and renamed when COMPLETE. One without the marker is never loaded and never
in the way.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_refine.config import ConfigError, ModelConfig
from megatron_refine.errors import COPY, CheckpointError, DamagedError
from megatron_refine.files import TornError, fingerprint, numbered, read, read_json, sync, write
from megatron_refine.models import family

MANIFEST, COMPLETE, LATEST = "manifest.json", "COMPLETE", "latest"
STEP, TEMPORARY = "step_", ".incomplete-"
UNFINISHED = re.compile(rf"{re.escape(TEMPORARY)}(old-|.+-[0-9]+-)?{STEP}[0-9]+")  # an attempt's name ends in a number
WEIGHTS_ONLY = "weights_only"  # key of the manifest of a converted checkpoint, which has no optimizer
Files = dict[str, dict[str, Any]]  # by name: size, sha256
ORIGIN = "hf"  # folder in a checkpoint: what a model came with (configuration, tokenizer), to go back with it


def step_folder(root: Path, step: int) -> Path:
    return root / f"{STEP}{step:07d}"


def complete_folders(root: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first: of our own folders those with a marker."""
    return [path for step, path in numbered(root, STEP) if (path / COMPLETE).is_file() and not _renamed(path, step)]


def last_step(root: Path) -> int:
    """Return the step of a run's newest complete checkpoint; -1 without one."""
    return max((int(path.name.removeprefix(STEP)) for path in complete_folders(root)), default=-1)


def own_folders(root: Path) -> list[Path]:
    """Return those that a save has written: a copy `step_7` of `step_0000007` is somebody's, and never removed."""
    return [path for path in complete_folders(root) if path == step_folder(root, int(path.name.removeprefix(STEP)))]


def unfinished_folders(root: Path) -> list[Path]:
    """What attempts at a run left behind when they were killed in a save."""
    found = (path for path in root.iterdir() if UNFINISHED.fullmatch(path.name))
    return [path for path in found if path.is_dir() and not path.is_symlink()]


def _renamed(folder: Path, step: int) -> bool:
    """Whether the folder is somebody's copy of another step."""
    with contextlib.suppress(OSError, TornError, TypeError, KeyError):
        manifest = read_json(folder / MANIFEST)
        return bool(manifest["step"] != step and not manifest.get(WEIGHTS_ONLY))
    return False


def payload(folder: Path) -> list[str]:
    """The files that a manifest lists, sorted, relative to the folder. Raises CheckpointError where one is a link."""
    entries = [path for path in folder.rglob("*") if path.is_symlink() or path.is_file()]
    for path in sorted(path for path in entries if path.is_symlink()):
        raise CheckpointError(
            f"{path}: a link, which may lead out of the checkpoint; copy the folder with what its links name (cp -rL)"
        )
    names = (path.relative_to(folder).as_posix() for path in entries)
    return sorted(name for name in names if name not in (MANIFEST, COMPLETE))


def hashes(folder: Path, share: int = 0, shares: int = 1) -> Files:
    """Return the `fingerprints` of every `shares`-th file."""
    return fingerprints(folder, payload(folder)[share::shares])


def fingerprints(folder: Path, names: Sequence[str]) -> Files:
    """Return size and SHA-256 of files, which are brought to the disk before: the marker vouches for them."""
    for path in {*(folder / name for name in names), *((folder / name).parent for name in names)}:
        sync(path)
    return {name: fingerprint(folder / name) for name in names}


def seal(folder: Path, final: Path, contents: dict[str, Any]) -> None:
    """Complete a run's checkpoint, rename the folder to its final name, point `latest` to it."""
    complete(folder, contents)
    _make_way(final, contents["step"])
    folder.rename(final)
    sync(final.parent)
    write(final.parent / LATEST, final.name)


def discard(folder: Path) -> None:
    """Remove a checkpoint. When killed in it, no half of one is left under its name."""
    doomed = folder.with_name(f"{TEMPORARY}old-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _make_way(final: Path, step: int) -> None:
    """An older attempt at this step, complete or not, is replaced by its equal; a stranger's link, file or copy under
    the name is set aside."""
    if not os.path.lexists(final):
        return
    copied = (final / COMPLETE).is_file() and _renamed(final, step)
    if final.is_dir() and not final.is_symlink() and not copied:
        return discard(final)
    names = (final.with_name(f"{final.name}.aside{number or ''}") for number in range(1000))
    final.rename(next(name for name in names if not os.path.lexists(name)))


def complete(folder: Path, contents: dict[str, Any]) -> None:
    """Write the manifest and the marker."""
    text = json.dumps(contents, indent=1, sort_keys=True)
    write(folder / MANIFEST, text)
    write(folder / COMPLETE, hashlib.sha256(text.encode()).hexdigest())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete checkpoint. Raises CheckpointError where there is none or it says nothing sensible,
    DamagedError where it was altered."""
    try:
        text, marker = read(folder / MANIFEST), read(folder / COMPLETE)
    except OSError as error:
        raise CheckpointError(f"{folder}: not a complete checkpoint: {error.strerror}: {error.filename}") from None
    except TornError as error:
        raise DamagedError(f"{str(error).split(';')[0]}; {_remedy(folder)}") from None
    if hashlib.sha256(text.encode()).hexdigest() != marker.strip():
        raise DamagedError(f"{folder / MANIFEST}: damaged: does not match {COMPLETE}; {_remedy(folder)}")
    contents: dict[str, Any] = {}
    with contextlib.suppress(ValueError, RecursionError):
        contents = json.loads(text)
    wanted = {"step": int, "model": dict, "layout": list, "files": dict}
    if not isinstance(contents, dict) or any(not isinstance(contents.get(key), t) for key, t in wanted.items()):
        raise CheckpointError(f"{folder / MANIFEST}: is no checkpoint's manifest, which has {', '.join(wanted)}; "
                              "choose another checkpoint")  # fmt: skip
    for name, entry in contents["files"].items():
        if not isinstance(entry, dict) or not {"size", "sha256"} <= entry.keys():
            raise CheckpointError(f"{folder / MANIFEST}: {name}: no size or sha256; {COPY}")
    return contents


def model_in(folder: Path, manifest: dict[str, Any]) -> ModelConfig:
    """The model that a manifest describes. Raises CheckpointError where this version knows no such model."""
    section = manifest["model"]
    try:
        return family.stored(section["family"]).config.model_validate(section)
    except (KeyError, TypeError):
        name, known = section.get("family"), ", ".join(family.FAMILIES)
        raise CheckpointError(f"{folder}: model.family is {name!r}; known are {known}{family.hint(name)}") from None
    except (ConfigError, ValueError) as error:
        cause = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{folder / MANIFEST}: model: {cause}") from None


def check_files(folder: Path, expected: dict[str, dict[str, Any]], share: int = 0, shares: int = 1) -> None:
    """Compare every `shares`-th file with the manifest. Raises DamagedError naming the first that differs."""
    present = set(payload(folder))
    for name in sorted(present - expected.keys())[:1]:
        raise DamagedError(f"{folder / name}: not in the manifest; {_remedy(folder)}")
    for name in sorted(expected)[share::shares]:
        if name not in present:
            raise DamagedError(f"{folder / name}: missing; {_remedy(folder)}")
        found = fingerprint(folder / name)
        if found["size"] != expected[name]["size"]:
            wanted = expected[name]["size"]
            raise DamagedError(f"{folder / name}: truncated: {found['size']} bytes of {wanted}; {_remedy(folder)}")
        if found["sha256"] != expected[name]["sha256"]:
            raise DamagedError(f"{folder / name}: damaged: sha256 differs; {_remedy(folder)}")


def _remedy(folder: Path) -> str:
    others = [p.name for p in complete_folders(folder.parent) if p != folder]
    return f"delete {folder} to go back to {others[-1]}" if others else f"delete {folder} to start anew"
