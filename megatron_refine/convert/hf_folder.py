"""A model folder in Hugging Face's format: its files are checked when it is opened, its tensors read one by one."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_refine.convert.errors import ConversionError
from megatron_refine.convert.fields import read_config
from megatron_refine.convert.tensorfile import Spec, TensorFile
from megatron_refine.files import fingerprint, read_json, write_json

WEIGHTS, INDEX, CHECKSUMS = "model.safetensors", "model.safetensors.index.json", "checksums.json"
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"}


class HFFolder:
    """Reads tensors by the names they have in the folder. Raises ConfigError for config.json, ConversionError for
    weights."""

    def __init__(self, path: Path):
        self.path = path
        self.config = read_config(path)
        _check_checksums(path)
        self.index = path / INDEX if (path / INDEX).exists() and not (path / WEIGHTS).exists() else None
        names = self._index_files() if self.index else [WEIGHTS]
        self._check_strays(names)
        self.files = {name: TensorFile(path / name) for name in names}
        self._owner: dict[str, TensorFile] = {}
        for file in self.files.values():
            for name in file.places:
                if name in self._owner:
                    other = self._owner[name].path.name
                    raise ConversionError(f"{file.path}: {name}: is in {other} too; fetch the folder again")
                self._owner[name] = file
        if self.index:
            self._check_index()

    @property
    def specs(self) -> dict[str, Spec]:
        """Dtype and shape of every tensor."""
        return {name: file.places[name].spec for name, file in self._owner.items()}

    def __getitem__(self, name: str) -> Tensor:
        """The tensor `name`. Raises ConversionError where it has values that are not finite."""
        tensor = self._owner[name].read(name)
        if not torch.isfinite(tensor).all():
            raise ConversionError(f"{self._owner[name].path}: {name}: has NaN or infinite values; fetch the file again")
        return tensor

    def other_files(self) -> list[Path]:
        """config.json, tokenizer, code: what belongs to the model beside weights."""
        files = sorted(p for p in self.path.iterdir() if p.is_file() and not p.name.startswith("."))
        return [
            p for p in files if p.suffix not in WEIGHT_SUFFIXES and not p.name.endswith(".index.json")
            and not (p.name == CHECKSUMS and _checksums(self.path))
        ]  # fmt: skip

    def _index_files(self) -> list[str]:
        assert self.index
        try:
            weight_map = read_json(self.index)["weight_map"]
            return sorted({name + "" for name in weight_map.values()})  # a TypeError for what is no name
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ConversionError(f"{self.index}: has no weight_map of names to files; fetch it again") from None

    def _check_index(self) -> None:
        assert self.index
        weight_map = read_json(self.index)["weight_map"]
        for name in sorted(weight_map.keys() ^ self._owner.keys()):
            where = f"is not in {weight_map[name]}" if name in weight_map else "is in a file, but not in the index"
            raise ConversionError(f"{self.index}: {name}: {where}; fetch the folder again")
        for name, file in self._owner.items():
            if weight_map[name] != file.path.name:
                places = f"is in {file.path.name}, not in {weight_map[name]}"
                raise ConversionError(f"{self.index}: {name}: {places}; fetch it again")

    def _check_strays(self, names: list[str]) -> None:
        """Weights beside the model's are a mistake; safetensors of another name are somebody's own."""
        present = {p.name for p in self.path.glob("model*.safetensors")}
        if not present:
            raise ConversionError(
                f"{self.path}: no safetensors files; save the model with save_pretrained(safe_serialization=True)"
            )
        for name in sorted(present - set(names)):
            raise ConversionError(f"{self.path / name}: is neither {WEIGHTS} nor listed in {INDEX}; move it away")
        for name in sorted(set(names) - present):
            raise ConversionError(f"{self.path / name}: missing; fetch it again")


def write_checksums(folder: Path) -> None:
    """Hashes of the folder's files, which a later reader checks."""
    found = {p.name: fingerprint(p) for p in sorted(folder.iterdir()) if p.name != CHECKSUMS}
    write_json(folder / CHECKSUMS, found)


def _checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the hashes that a conversion wrote; none of a folder from elsewhere, which may have a file so named."""
    listed = read_json(folder / CHECKSUMS) if (folder / CHECKSUMS).exists() else {}
    entries = listed.values() if isinstance(listed, dict) else [None]
    ours = all(isinstance(entry, dict) and entry.keys() == {"size", "sha256"} for entry in entries)
    return listed if ours else {}


def _check_checksums(folder: Path) -> None:
    """Compare the files with the hashes that a conversion wrote. Raises ConversionError."""
    for name, wanted in sorted(_checksums(folder).items()):
        path = folder / name
        if not path.exists():
            raise ConversionError(f"{path}: missing; {CHECKSUMS} lists it")
        found = fingerprint(path)
        if found != wanted:
            what = "truncated" if found["size"] < wanted["size"] else "damaged"
            raise ConversionError(
                f"{path}: {what}: not what {CHECKSUMS} says; convert again, or delete {CHECKSUMS} if you changed it"
            )
