"""safetensors files, one tensor in memory at a time: checked when opened, written in place in any order.

The format: 8 bytes with the length of a JSON header, the header (name -> dtype, shape, offsets), the bytes. Unlike the
library, which maps files into memory, this reads a tensor's bytes only when asked, and knows what a damaged file lacks.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_refine.convert.errors import ConversionError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; the library's own limit


@dataclass(frozen=True)
class Spec:
    """What a tensor is."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Place:
    """A tensor and its first byte in the file."""

    spec: Spec
    start: int


class TensorFile:
    """A safetensors file to read. Raises ConversionError where it is damaged, naming file and tensor."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.places, self.metadata = _parse(path)
        except OSError as error:
            raise ConversionError(f"{path}: cannot be read: {error.strerror}") from None

    def read(self, name: str) -> Tensor:
        """The tensor, on CPU, in its own memory."""
        place = self.places[name]
        buffer = bytearray(place.spec.nbytes)
        with self.path.open("rb") as file:
            file.seek(place.start)
            if file.readinto(buffer) != len(buffer):
                raise ConversionError(f"{self.path}: truncated within {name}; fetch it again")
        flat = torch.frombuffer(buffer, dtype=place.spec.dtype) if buffer else torch.empty(0, dtype=place.spec.dtype)
        return flat.view(place.spec.shape)


class TensorFileWriter:
    """A safetensors file whose tensors are known; their bytes come in any order."""

    def __init__(self, path: Path, specs: dict[str, Spec], metadata: dict[str, str] | None):
        self.path = path
        header, self.places = _header(specs, metadata)
        with path.open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(spec.nbytes for spec in specs.values()))
        self.missing = set(specs)

    def write(self, name: str, tensor: Tensor) -> None:
        place = self.places[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (place.spec.dtype, place.spec.shape), name
        with self.path.open("r+b") as file:
            file.seek(place.start)
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        self.missing.discard(name)


def _header(specs: dict[str, Spec], metadata: dict[str, str] | None) -> tuple[bytes, dict[str, Place]]:
    """The beginning of a file with these tensors, in this order; padded to a multiple of 8 as the library does."""
    tree: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for name, spec in specs.items():
        end = offset + spec.nbytes
        tree[name] = {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(tree, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    places = {name: Place(spec, start + tree[name]["data_offsets"][0]) for name, spec in specs.items()}
    return len(text).to_bytes(8, "little") + text, places


def _parse(path: Path) -> tuple[dict[str, Place], dict[str, str] | None]:
    """Where each tensor lies, in the order of the bytes; these must be the tensors', neither more nor less."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > MAX_HEADER:
            raise ConversionError(f"{path}: damaged: no safetensors header; fetch it again")
        if size < 8 + length:
            raise ConversionError(f"{path}: truncated: {size} bytes, the header alone has {8 + length}; fetch it again")
        text = file.read(length)
    try:
        tree = json.loads(text)
        metadata = tree.pop("__metadata__", None)
        entries = sorted(tree.items(), key=lambda item: item[1]["data_offsets"])
        places, end = {}, 8 + length
        for name, entry in entries:
            places[name] = _place(path, name, entry, 8 + length, end)
            end += places[name].spec.nbytes
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ConversionError(
            f"{path}: damaged: no safetensors header ({type(error).__name__}); fetch it again"
        ) from None
    if end != size:
        what = "truncated" if size < end else "damaged"
        raise ConversionError(f"{path}: {what}: {size} bytes, its header says {end}; fetch it again")
    return places, metadata


def _place(path: Path, name: str, entry: dict[str, Any], base: int, expected: int) -> Place:
    """An entry of the header; offsets count from `base`, and the tensor must begin where the one before it ended."""
    if entry["dtype"] not in DTYPES:
        known = ", ".join(DTYPES)
        raise ConversionError(f"{path}: {name}: dtype {entry['dtype']} cannot be converted; known are {known}")
    spec = Spec(DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"]))
    first, last = (base + offset for offset in entry["data_offsets"])
    if first != expected or last - first != spec.nbytes:
        raise ConversionError(f"{path}: {name}: damaged: its shape and offsets do not agree; fetch the file again")
    return Place(spec, first)
