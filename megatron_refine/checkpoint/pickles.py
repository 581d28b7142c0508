"""What a checkpoint's pickles may name: torch and Megatron read parts of it by pickle, which calls whatever it names.

So before anything reads a checkpoint, every pickle in it is followed opcode by opcode, nothing of it being run, and
refused unless all that it names is among what our own checkpoints hold. These are: `.metadata`, a plain pickle;
`common.pt`, up to Megatron-Core 0.16; and every piece in the `.distcp` files, which torch.save wrote (a zip with a
pickle in it). Of a piece, `.metadata` says where it lies; so it also must not lead out of the folder.
"""

import pickletools
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from megatron_refine.errors import COPY, CheckpointError
from megatron_refine.files import TornError, read_json
from megatron_refine.platform.megatron.version import VERSION, since

METADATA, CONFIG = ".metadata", "metadata.json"
# metadata.json since Megatron-Core 0.17, and before, which all versions read
WITHOUT_COMMON = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
WITH_COMMON = WITHOUT_COMMON | {"common_backend": "torch", "common_backend_version": 1}
_DTYPES = {"float64": "Double", "float32": "Float", "float16": "Half", "bfloat16": "BFloat16"}
IN_METADATA = frozenset(
    {("torch", "Size"), ("torch.serialization", "_get_layout")}
    | {("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")}  # of conversions; the second is Python 3.13's name
    | {("torch.distributed.checkpoint.filesystem", "_StorageInfo")}
    | {("torch", dtype) for dtype in _DTYPES}
    | {("torch.distributed.checkpoint.metadata", name) for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )}
    | {("torch.distributed.checkpoint.planner", name) for name in (
        "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"
    )}
)  # fmt: skip
IN_SAVED = frozenset(
    {("torch._utils", "_rebuild_tensor_v2"), ("collections", "OrderedDict"), ("torch", "ByteStorage")}
    | {("torch", f"{name}Storage") for name in _DTYPES.values()}
)
# what pickle writes for plain data and these classes, in any protocol; no opcode to fetch what is not named in place
_OPCODES = frozenset(
    "PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT "
    "BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT "
    "DICT SETITEM SETITEMS EMPTY_SET ADDITEMS FROZENSET GLOBAL STACK_GLOBAL INST OBJ REDUCE NEWOBJ NEWOBJ_EX BUILD "
    "BINPERSID MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET".split()
)
_TEXTS = frozenset({"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"})
_CALLS = frozenset({"REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ"})
_FILLS = frozenset({"BUILD", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS"})


class _Named(NamedTuple):
    """On the stack: what a module and a name stand for."""

    module: str
    name: str


_MARK = object()
_OTHER = object()  # a value that is neither text nor named


class _Stack:
    """The stack and the memo of a pickle, as far as they tell what it names, calls and fills."""

    def __init__(self, allowed: Collection[tuple[str, str]]):
        self.allowed, self.values, self.memo = allowed, list[Any](), dict[int, Any]()

    def follow(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        """One opcode. Raises ValueError with what is wrong with it, IndexError, KeyError where it lacks values."""
        name = opcode.name
        if name not in _OPCODES:
            raise ValueError(f"the opcode {name}, which no checkpoint holds")
        if name in _TEXTS:
            self.values.append(argument)
        elif name == "MARK":
            self.values.append(_MARK)
        elif name == "MEMOIZE" or name.endswith("PUT"):
            place = len(self.memo) if argument is None else int(argument)
            if place > len(self.memo):  # pickle counts them; it makes room for all places below
                raise ValueError("a place in its memo that is not the next one")
            self.memo[place] = self.values[-1]
        elif name.endswith("GET"):
            self.values.append(self.memo[int(argument)])
        elif name in ("GLOBAL", "INST"):
            named = self._name(*argument.split(" ", 1))
            self.values[len(self.values) - len(self._taken(opcode)) :] = [named if name == "GLOBAL" else _OTHER]
        elif name == "STACK_GLOBAL":
            module, attribute = self.values.pop(-2), self.values.pop()
            self.values.append(self._name(module, attribute))
        else:
            self._change(opcode)

    def _change(self, opcode: pickletools.OpcodeInfo) -> None:
        taken = self._taken(opcode)
        first = next((value for value in taken if value is not _MARK), None)
        if opcode.name in _CALLS and not isinstance(first, _Named):
            raise ValueError("a call of something that it does not name")
        if opcode.name in _FILLS and isinstance(first, _Named):
            raise ValueError(f"a change of {first.module} {first.name} itself")
        del self.values[len(self.values) - len(taken) :]
        self.values += [_OTHER] * len(opcode.stack_after)

    def _taken(self, opcode: pickletools.OpcodeInfo) -> list[Any]:
        """The values that the opcode takes from the stack."""
        wanted = opcode.stack_before
        if pickletools.markobject in wanted:
            below = wanted.index(pickletools.markobject)
            last = next(i for i in reversed(range(len(self.values))) if self.values[i] is _MARK)
            count = len(self.values) - last + below
        else:
            below = count = len(wanted)
        taken = self.values[len(self.values) - count :] if count else []
        if count > len(self.values) or (opcode.name != "POP" and _MARK in taken[:below]):
            raise IndexError
        return taken

    def _name(self, module: object, name: object) -> _Named:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name that is made up while it is read")
        if (module, name) not in self.allowed:
            raise ValueError(f"{module} {name}, which no checkpoint holds")
        return _Named(module, name)


def check_pickle(content: bytes, where: str, allowed: Collection[tuple[str, str]]) -> None:
    """Follow a pickle. Raises CheckpointError where it is damaged, or names or does what is not allowed."""
    stack, end = _Stack(allowed), 0
    try:
        for opcode, argument, position in pickletools.genops(content):
            try:
                stack.follow(opcode, argument)
            except ValueError as error:
                _refuse(where, str(error))
            end = (position or 0) + 1
    except CheckpointError:
        raise
    except Exception as error:  # whatever pickletools or the stack finds in garbage
        cause = " ".join(str(error).split())[:100] or "values are missing"
        raise _damaged(where, cause) from None
    if end != len(content):
        _refuse(where, "something behind its end")


def check_saved(file: Any, where: str) -> None:
    """Follow the pickle in what torch.save wrote into `file`, found as torch.load finds it. Raises CheckpointError."""
    from torch._C import PyTorchFileReader

    start = file.read(4)
    file.seek(0)
    try:
        if start != b"PK\x03\x04":  # torch.load then takes older formats, of several pickles
            raise ValueError("not a file of torch.save")
        reader = PyTorchFileReader(file)
        code, content = "constants.pkl" in reader.get_all_records(), reader.get_record("data.pkl")
    except (RuntimeError, ValueError, OSError) as error:
        raise _damaged(where, " ".join(str(error).split())[:100]) from None
    if code:
        _refuse(where, "TorchScript, which is a program")
    check_pickle(content, where, IN_SAVED)


def check_pickles(folder: Path, files: Collection[str], share: int = 0, shares: int = 1) -> None:
    """Follow every pickle of a checkpoint whose files are `files`, and every `shares`-th piece of its tensors.

    Raises CheckpointError that names the file and what it must not hold.
    """
    _check_format(folder / CONFIG)
    for name in sorted(files):
        if name.endswith(METADATA):
            check_pickle((folder / name).read_bytes(), str(folder / name), IN_METADATA)
        elif name.endswith(".pt"):
            with (folder / name).open("rb") as file:
                check_saved(file, str(folder / name))
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.utils import _create_file_view

    for place in _places(folder, files, FileSystemReader(folder).read_metadata)[share::shares]:
        with (folder / place.file).open("rb") as file:
            view = _create_file_view(file, place.start, place.length)
            check_saved(view, f"{folder / place.file}: at {place.start}")


class _Place(NamedTuple):
    """Of a piece: its file and where it stands there, in bytes."""

    file: str
    start: int
    length: int


def _places(folder: Path, files: Collection[str], read: Any) -> list[_Place]:
    """Of all pieces, sorted. Raises CheckpointError where one is not within a file of the checkpoint."""
    try:
        found = [(_Place(x.relative_path, x.offset, x.length), x.transform_descriptors)
                 for x in read().storage_data.values()]  # fmt: skip
        sizes = {name: (folder / name).stat().st_size for name in files}
        for place, transforms in found:
            if place.file not in sizes:
                _refuse(str(folder / METADATA), f"{place.file!r}, which is no file of the checkpoint")
            if transforms or place.start < 0 or not 0 < place.length <= sizes[place.file] - place.start:
                _refuse(str(folder / METADATA), f"a piece that {place.file} does not hold")
        return sorted(place for place, _ in found)
    except CheckpointError:
        raise
    except Exception as error:  # of a pickle that is in order and is not a checkpoint's
        raise _damaged(str(folder / METADATA), f"{type(error).__name__}: {error}") from None


def _check_format(path: Path) -> None:
    """Megatron reads what this file names: only the formats that are checked here may be named."""
    try:
        found = read_json(path)
    except (OSError, TornError) as error:
        raise _damaged(str(path), str(getattr(error, "strerror", error))) from None
    if found not in (WITH_COMMON, WITHOUT_COMMON):
        raise CheckpointError(f"{path}: does not name the format of our checkpoints, {WITH_COMMON}; {COPY}")
    if found == WITHOUT_COMMON and not since(0, 17):
        raise CheckpointError(
            f"{path.parent}: was written with Megatron-Core 0.17 or later, which {VERSION} does not read: go on with "
            "it on Python 3.12 or later, or export it there and start from the export (docs/compatibility.md)"
        )


def _refuse(where: str, what: str) -> NoReturn:
    raise CheckpointError(
        f"{where}: holds {what}: reading it could run any command, so nothing was read; copy the checkpoint from a "
        "source that you trust, or delete it"
    )


def _damaged(where: str, cause: str) -> CheckpointError:
    return CheckpointError(f"{where}: damaged: {cause}; {COPY}, or delete it")
