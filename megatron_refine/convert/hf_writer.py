"""Write a model folder in Hugging Face's format: shards of a size, or those that the model came in."""

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_refine.config import ConfigError
from megatron_refine.convert.errors import ConversionError
from megatron_refine.convert.hf_folder import INDEX, WEIGHTS, HFFolder
from megatron_refine.convert.tensorfile import DTYPES, NAMES, Spec, TensorFileWriter
from megatron_refine.files import TornError, read_json, write_json

FORMAT = {"format": "pt"}
SIZES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Shard:
    """The tensors of a file, in the order of their bytes."""

    tensors: list[str]
    metadata: dict[str, str] | None = field(default_factory=lambda: dict(FORMAT))


@dataclass(frozen=True)
class Origin:
    """How a model stood in the folder that it came from; kept in Megatron's folder, so that it can go back the same."""

    shards: dict[str, Shard]  # file name -> its tensors, by the names that they had there
    dtypes: dict[str, str]  # name there -> dtype
    stored: dict[str, str]  # today's name -> name there

    @classmethod
    def of(cls, folder: HFFolder, stored: dict[str, str]) -> "Origin":
        shards = {name: Shard(list(file.places), file.metadata) for name, file in folder.files.items()}
        return cls(shards, {name: NAMES[spec.dtype] for name, spec in folder.specs.items()}, stored)

    def to_json(self) -> dict[str, Any]:
        shards = {name: vars(shard) for name, shard in self.shards.items()}
        return {"shards": shards, "dtypes": self.dtypes, "stored": self.stored}

    @classmethod
    def read(cls, path: Path, names: Collection[str], unused: Collection[str]) -> "Origin":
        """What `to_json` gave, of a model with the tensors `names` and with `unused` ones.

        Raises ConversionError where a file name leads elsewhere, or the tensors are others.
        """
        try:
            tree = read_json(path)
            shards = {name: Shard(**shard) for name, shard in tree["shards"].items()}
            found = cls(shards, tree["dtypes"], tree["stored"])
            listed = sorted(name for shard in shards.values() for name in shard.tensors)
            whole = found.stored.keys() == set(names)
            whole &= listed == sorted([*found.stored.values(), *unused]) == sorted(found.dtypes)
            whole &= all(Path(file).name == file and file.endswith(".safetensors") for file in shards)
            whole &= all(dtype in DTYPES for dtype in found.dtypes.values())
            if whole:
                return found
        except (TornError, KeyError, TypeError, AttributeError):
            pass
        raise ConversionError(f"{path}: does not belong to this model; copy the checkpoint again")


def size_in_bytes(text: str) -> int:
    """`5GB`, `500MB`, `2GiB` or a number of bytes. Raises ConfigError."""
    match = re.fullmatch(r"(\d+)\s*([KMG]I?B)?", text.strip().upper())
    if not match or int(match[1]) == 0:
        raise ConfigError(f"--max-shard-size {text}: not a size; write 5GB, 500MB or a number of bytes")
    return int(match[1]) * SIZES[match[2] or ""]


def sharded(specs: dict[str, Spec], limit: int) -> dict[str, Shard]:
    """File name -> tensors: one file if they fit, else files of at most `limit` bytes (or of one larger tensor)."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if groups[-1] and size + spec.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += spec.nbytes
    if len(groups) == 1:
        return {WEIGHTS: Shard(groups[0])}
    total = len(groups)
    return {f"model-{i:05d}-of-{total:05d}.safetensors": Shard(names) for i, names in enumerate(groups, 1)}


class HFWriter:
    """The weights of a folder, tensor by tensor in any order."""

    def __init__(self, folder: Path, specs: dict[str, Spec], shards: dict[str, Shard]):
        self.specs = specs
        self.files = {
            file: TensorFileWriter(folder / file, {name: specs[name] for name in shard.tensors}, shard.metadata)
            for file, shard in shards.items()
        }
        self._owner = {name: self.files[file] for file, shard in shards.items() for name in shard.tensors}
        assert self._owner.keys() == specs.keys()
        if list(shards) != [WEIGHTS]:
            self._write_index(folder / INDEX)

    def write(self, name: str, tensor: Tensor) -> None:
        self._owner[name].write(name, tensor)

    def finish(self) -> None:
        """Nothing may be left unwritten."""
        for file in self.files.values():
            assert not file.missing, f"{file.path}: {sorted(file.missing)} not written"

    def _write_index(self, path: Path) -> None:
        total = sum(spec.nbytes for spec in self.specs.values())
        weight_map = {name: file.path.name for name, file in sorted(self._owner.items())}
        tree = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(path, tree, indent=2, sort_keys=True)
