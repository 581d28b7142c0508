"""What a model in Hugging Face's format came with. Every checkpoint of a run that started from it keeps it in hf/.

So the way back gives the same files, bit by bit, where the weights did not change.
"""

import shutil
from pathlib import Path

from megatron_refine.checkpoint.manifest import ORIGIN
from megatron_refine.checkpoint.source import Source
from megatron_refine.convert.hf_folder import INDEX
from megatron_refine.convert.hf_writer import Origin
from megatron_refine.convert.source import HFSource
from megatron_refine.convert.tensorfile import TensorFileWriter
from megatron_refine.files import write_json

ORIGIN_FILE, UNUSED = "origin.json", "unused.safetensors"


def carry(source: Source, kept: Path) -> None:
    """`keep` what a run's first model came with; of a checkpoint what that has kept, if anything."""
    if not source.is_checkpoint:
        return keep(HFSource(source.folder), kept)
    shutil.rmtree(kept, ignore_errors=True)
    if (source.folder / ORIGIN).is_dir():
        shutil.copytree(source.folder / ORIGIN, kept)
        for path in (kept, *kept.rglob("*")):  # a source may be closed to writing
            path.chmod(0o755 if path.is_dir() else 0o644)


def keep(source: HFSource, kept: Path) -> None:
    """Write the folder `kept` anew: the other files, names, dtypes and shards of the model, and unused tensors."""
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    for path in [*source.folder.other_files(), *([source.folder.index] if source.folder.index else [])]:
        shutil.copy(path, kept / path.name)
    write_json(kept / ORIGIN_FILE, Origin.of(source.folder, source.stored).to_json())
    if source.unused:
        specs = {name: source.folder.specs[name] for name in source.unused}
        writer = TensorFileWriter(kept / UNUSED, specs, None)
        for name in source.unused:
            writer.write(name, source.folder[name])


def restore(kept: Path, folder: Path, index: bool) -> None:
    """Copy the files that stood beside the weights to `folder`; the index, where the shards are the same."""
    for path in kept.iterdir():
        if path.name not in (ORIGIN_FILE, UNUSED) and (index or path.name != INDEX):
            shutil.copy(path, folder / path.name)
