"""When a checkpoint folder counts: a manifest with every file's hash, and a COMPLETE marker with the manifest's.

A folder is written under a temporary name and renamed when COMPLETE. One without the marker is never loaded and never
in the way.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from megatron_refine.files import fingerprint, sync, write
from megatron_refine.trainer.errors import CheckpointError, DamagedError

MANIFEST, COMPLETE, LATEST = "manifest.json", "COMPLETE", "latest"
TEMPORARY = ".incomplete-"
WEIGHTS_ONLY = "weights_only"  # key of the manifest of a converted checkpoint, which has no optimizer
ORIGIN = "hf"  # folder in a checkpoint: what a model came with (configuration, tokenizer), to go back with it


def step_folder(root: Path, step: int) -> Path:
    return root / f"step_{step:07d}"


def complete_folders(root: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(path.parent for path in root.glob(f"step_*/{COMPLETE}"))


def payload(folder: Path) -> list[str]:
    """The files that a manifest lists, sorted, relative to the folder."""
    files = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in files if name not in (MANIFEST, COMPLETE))


def seal(folder: Path, final: Path, contents: dict[str, Any]) -> None:
    """Complete a run's checkpoint, rename the folder to its final name, point `latest` to it."""
    complete(folder, contents)
    if final.exists():  # an older attempt at this step, about to be replaced by its equal
        shutil.rmtree(final)
    folder.rename(final)
    sync(final.parent)
    write(final.parent / LATEST, final.name)


def complete(folder: Path, contents: dict[str, Any]) -> None:
    """Write the manifest and the marker."""
    text = json.dumps(contents, indent=1, sort_keys=True)
    write(folder / MANIFEST, text)
    write(folder / COMPLETE, hashlib.sha256(text.encode()).hexdigest())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete checkpoint. Raises CheckpointError where there is none, DamagedError where it was
    altered."""
    try:
        text, marker = (folder / MANIFEST).read_text(encoding="utf-8"), (folder / COMPLETE).read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{folder}: not a complete checkpoint: {error.strerror}: {error.filename}") from None
    except UnicodeDecodeError:
        raise DamagedError(f"{folder / MANIFEST}: damaged: not text; {_remedy(folder)}") from None
    if hashlib.sha256(text.encode()).hexdigest() != marker.strip():
        raise DamagedError(f"{folder / MANIFEST}: damaged: does not match {COMPLETE}; {_remedy(folder)}")
    contents: dict[str, Any] = json.loads(text)
    return contents


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
