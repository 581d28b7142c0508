"""Hugging Face's format <-> checkpoints, tensor by tensor: no more than a few tensors are in memory at any time.

A converted checkpoint is a folder like those of a run, with weights alone, so that checkpoint.load starts from it. What
the model came with is kept in its hf/ folder, and in that of every checkpoint of a run that started from it: the way
back gives the same files, bit by bit, where the weights did not change.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from megatron_refine.checkpoint.manifest import (
    ORIGIN,
    TEMPORARY,
    WEIGHTS_ONLY,
    check_files,
    complete,
    hashes,
    model_in,
    read_manifest,
)
from megatron_refine.checkpoint.origin import ORIGIN_FILE, UNUSED, keep, restore
from megatron_refine.checkpoint.pickles import check_pickles
from megatron_refine.checkpoint.plain import PlainReader, write_plain
from megatron_refine.checkpoint.source import refuse_existing
from megatron_refine.config import ModelConfig
from megatron_refine.convert import inventory
from megatron_refine.convert.errors import ConversionError
from megatron_refine.convert.fields import CONFIG, fresh_config
from megatron_refine.convert.hf_folder import write_checksums
from megatron_refine.convert.hf_writer import HFWriter, Origin, sharded
from megatron_refine.convert.mapping import Converter
from megatron_refine.convert.source import HFSource, megatron_specs
from megatron_refine.convert.tensorfile import DTYPES, NAMES, Spec, TensorFile
from megatron_refine.files import read_json, sync, write, write_json
from megatron_refine.progress import Progress, counted

MODEL = "model.yaml"
TORCH_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in NAMES}
DTYPE_FIELDS = ("torch_dtype", "dtype")  # of config.json; transformers 5 writes the second


class MegatronSource:
    """A checkpoint whose every file and tensor is accounted for; reads full tensors by global names."""

    def __init__(self, path: Path):
        self.path, manifest = path, read_manifest(path)
        files: dict[str, Any] = manifest["files"]
        for i in counted(range(len(files)), "check files", len(files), "files"):
            check_files(path, files, i, len(files))
        check_pickles(path, files)
        self.model: ModelConfig = model_in(path, manifest)
        self.converter = Converter(self.model)
        self._reader = PlainReader(path)
        self.specs = self._reader.specs
        inventory.check(str(path), self.specs, self.converter.megatron_shapes)
        self.kept = path / ORIGIN if (path / ORIGIN / ORIGIN_FILE).exists() else None
        self.unused = TensorFile(self.kept / UNUSED) if self.kept and (self.kept / UNUSED).exists() else None
        self.origin: Origin | None = None
        if self.kept:
            others = self.unused.places if self.unused else ()
            self.origin = Origin.read(self.kept / ORIGIN_FILE, self.converter.hf_shapes, others)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._reader[name]
        if not torch.isfinite(tensor).all():
            raise ConversionError(f"{self.path}: {name}: has NaN or infinite values; take an earlier checkpoint")
        return tensor


def hf_to_megatron(hf: Path, megatron: Path, dtype: torch.dtype | None = None) -> ModelConfig:
    """Convert a folder in Hugging Face's format into a checkpoint; `dtype` None: each tensor as it is.

    Returns the model. Raises ConfigError, ConversionError; nothing is left at `megatron` then.
    """
    refuse_existing(megatron)
    source = HFSource(hf)
    specs = megatron_specs(source.converter, {n: dtype or spec.dtype for n, spec in source.specs.items()})

    def produce(name: str) -> Tensor:
        progress.add()
        return cast(source.converter.to_megatron(name, source), specs[name].dtype, name)

    with fresh_folder(megatron, specs) as folder, Progress("convert", len(specs), "tensors") as progress:
        write_plain(folder, specs, produce)
        keep(source, folder / ORIGIN)
        section = source.model.model_dump()
        write(folder / MODEL, yaml.safe_dump({"model": section}, sort_keys=False))
        files = hashes(folder)
        complete(folder, {"step": 0, "model": section, "layout": [1, 1, 1, 1], "files": files, WEIGHTS_ONLY: True})
    return source.model


def megatron_to_hf(
    megatron: Path, hf: Path, dtype: torch.dtype | None = None, max_shard_size: int | None = None,
    beside: Callable[[Path], None] = lambda folder: None,
) -> ModelConfig:  # fmt: skip
    """Convert a checkpoint, of any layout, into a folder in Hugging Face's format.

    `dtype` None: each tensor as it came, where training kept it so, else as in the checkpoint. `max_shard_size` None:
    the files that the model came in, where every tensor has the dtype that it came with, else 5 GB. beside: adds files.
    Returns the model. Raises ConfigError, CheckpointError, ConversionError; nothing is left at `hf` then.
    """
    refuse_existing(hf)
    source = MegatronSource(megatron)
    converter, origin = source.converter, source.origin
    dtypes = {n: dtype or d for n, d in hf_dtypes(source).items()}
    stored = origin.stored if origin else {name: name for name in converter.hf_shapes}
    specs = {stored[name]: Spec(dtypes[name], shape) for name, shape in converter.hf_shapes.items()}
    unused = source.unused
    if unused:
        specs |= {name: Spec(dtype or place.spec.dtype, place.spec.shape) for name, place in unused.places.items()}
    as_came = origin is not None and all(NAMES[spec.dtype] == origin.dtypes[name] for name, spec in specs.items())
    same_files = as_came and max_shard_size is None
    shards = origin.shards if origin and same_files else sharded(specs, max_shard_size or 5 * 10**9)
    with fresh_folder(hf, specs) as folder:
        writer = HFWriter(folder, specs, shards)
        for name in counted(converter.megatron_shapes, "convert", len(converter.megatron_shapes), "tensors"):
            for theirs, part in converter.to_hf(name, source[name]):
                writer.write(stored[theirs], cast(part, dtypes[theirs], name))
        for name in unused.places if unused else ():
            writer.write(name, unused.read(name).to(specs[name].dtype))  # type: ignore[union-attr]
        writer.finish()
        if source.kept:
            restore(source.kept, folder, same_files)
        _write_config(folder, source.model, None if as_came else set(dtypes.values()))
        beside(folder)
        write_checksums(folder)
    return source.model


def hf_dtypes(source: MegatronSource) -> dict[str, torch.dtype]:
    """Each tensor's dtype in Hugging Face's format: as it came, if the checkpoint has what that was converted to."""
    converter, origin = source.converter, source.origin
    now = {theirs: source.specs[n].dtype for n in converter.megatron_shapes for theirs in converter.sources(n)}
    if origin is None:
        return now
    came = {name: DTYPES[origin.dtypes[origin.stored[name]]] for name in converter.hf_shapes}
    converted = megatron_specs(converter, came)
    for name, spec in converted.items():
        if spec.dtype == source.specs[name].dtype:
            now |= {theirs: came[theirs] for theirs in converter.sources(name)}
    return now


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The tensor in another dtype. Raises ConversionError where its values leave the range."""
    if tensor.dtype == dtype:
        return tensor
    result = tensor.to(dtype)
    if not torch.isfinite(result).all():
        raise ConversionError(f"{name}: has values beyond the range of {dtype}; convert with another --dtype")
    return result


@contextlib.contextmanager
def fresh_folder(target: Path, specs: dict[str, Spec]) -> Iterator[Path]:
    """A folder under a temporary name, renamed to `target` at the end; removed on any failure."""
    folder = target.parent / f"{TEMPORARY}{target.name}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)  # left by a conversion that was killed
        needed, free = sum(spec.nbytes for spec in specs.values()), shutil.disk_usage(target.parent).free
        if free < needed:
            raise ConversionError(
                f"{target}: disk full: the weights take {needed / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free"
            )
        folder.mkdir()
        yield folder
        folder.rename(target)
        sync(target.parent)
    except OSError as error:
        raise ConversionError(f"{error.filename or target}: {error.strerror}; nothing was left at {target}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_config(folder: Path, model: ModelConfig, dtypes: set[torch.dtype] | None) -> None:
    """config.json as it came, but for the dtype where that changed; a complete one of a model that came with none."""
    path = folder / CONFIG
    if path.exists() and dtypes is None:
        return
    assert dtypes
    dtype = TORCH_NAMES[max(dtypes, key=lambda d: d.itemsize)]
    if path.exists():
        tree = read_json(path)
        named = [name for name in DTYPE_FIELDS if tree.get(name) is not None] or DTYPE_FIELDS[:1]
        tree |= dict.fromkeys(named, dtype)
    else:
        tree = fresh_config(model, dtype)
    write_json(path, tree, indent=2)
