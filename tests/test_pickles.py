"""A stranger's checkpoint runs nothing: its pickles are followed before anything reads them, on every road."""

import copyreg
import io
import os
import pickle
import shutil
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_refine.checkpoint import pickles
from megatron_refine.checkpoint.pickles import IN_METADATA, IN_SAVED, check_pickle, check_pickles, check_saved
from megatron_refine.config import Config
from megatron_refine.errors import CheckpointError
from tests.conversions import hf_folder
from tests.parity import small_config
from tests.test_checkpoint import part, reseal, start


class Call:
    """What a pickle of it calls when it is read."""

    def __init__(self, function: Any, *arguments: Any):
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


SYSTEM = text("os") + text("system")
METADATA_CLASS = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
REFUSED: dict[str, tuple[bytes, str]] = {
    **{f"protocol {n}": (pickle.dumps(Call(os.system, "true"), n), "posix system") for n in range(6)},
    "eval": (pickle.dumps(Call(eval, "1")), "builtins eval"),
    "nested": (pickle.dumps([1, {"a": Call(pickle.loads, pickle.dumps(Call(os.system, "true")))}]), "_pickle loads"),
    "nested in torch": (
        pickle.dumps(Call(torch.storage._load_from_bytes, b"x")), "load_from_bytes"
    ),
    "getattr": (b"cbuiltins\ngetattr\n.", "builtins getattr"),
    "an old name of builtins": (b"c__builtin__\neval\n(S'1'\ntR.", "__builtin__ eval"),
    "instance": (b"(S'true'\nios\nsystem\n.", "os system"),
    "object": (b"(cos\nsystem\nS'true'\no.", "os system"),
    "by the memo": (
        b"\x80\x04" + text("os") + b"\x94" + text("system") + b"\x94" + b"0" * 2 + b"h\x00h\x01\x93.", "os system"
    ),
    "by the memo, renamed": (
        b"\x80\x04" + text("torch") + b"\x94" + text("Size") + b"\x94" + text("os") + b"q\x00" + b"h\x00h\x01\x93.",
        "os Size",
    ),
    "a name below others": (b"\x80\x04" + SYSTEM + b"N0\x93.", "os system"),
    "a dotted name": (b"\x80\x04" + text("torch") + text("hub.os.system") + b"\x93.", "torch hub.os.system"),
    "a name of bytes": (b"\x80\x04" + b"C\x02os" + text("system") + b"\x93.", "a name that is made up"),
    "a made-up name": (b"\x80\x04" + METADATA_CLASS + b")\x81" + text("system") + b"\x93.", "a name that is made up"),
    "a registered class": (b"\x82\x01.", "the opcode EXT1"),
    "a duplicate": (METADATA_CLASS + b"2.", "the opcode DUP"),
    "a class changed": (METADATA_CLASS + b"N}" + text("__init__") + b"Ns\x86b.", "a change of torch.distributed"),
    "a list that is a class": (METADATA_CLASS + b"Na.", "a change of torch.distributed"),
    "an instance called": (METADATA_CLASS + b")\x81)R.", "a call of something that it does not name"),
    "an instance made the old way, called": (
        b"(itorch.distributed.checkpoint.metadata\nMetadata\n)R.", "a call of something that it does not name"
    ),
    "a memo that takes all memory": (b"Nr\xff\xff\xff\x7f.", "a place in its memo that is not the next one"),
    "an allowed class, then more": (pickle.dumps(torch.Size([1])) + pickle.dumps(1), "something behind its end"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_pickle_that_names_anything_else_is_refused(kind: str) -> None:
    content, words = REFUSED[kind]
    with pytest.raises(CheckpointError) as error:
        check_pickle(content, "folder/.metadata", IN_METADATA)
    assert str(error.value).startswith("folder/.metadata: holds ") and words in str(error.value), error.value
    assert "copy the checkpoint from a source that you trust" in str(error.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage", b"\x80\x04", pickle.dumps({"a": [1, 2, 3]})[:-4], b"h\x05.", b"\x85.", b"\x80\x04\x93.", b"(.0s.",
     b"(\x85.", b"\x8a\xff\xff", b"}(u", b"\0" * 100],
)  # fmt: skip
def test_a_torn_pickle_is_one_line(content: bytes) -> None:
    with pytest.raises(CheckpointError) as error:
        check_pickle(content, "folder/.metadata", IN_METADATA)
    assert str(error.value).startswith("folder/.metadata: ") and "\n" not in str(error.value)


def test_plain_data_passes_in_every_protocol() -> None:
    shared = ["a", ("b", 1, 2.5, None, True, 1 << 80, b"bytes")]
    value = {"x": [shared, shared, {1, 2}, frozenset("ab")], "big": list(range(3000)), "text": "é" * 300}
    for protocol in range(6):
        names = [("_codecs", "encode"), ("builtins", "set"), ("__builtin__", "set"), ("__builtin__", "frozenset")]
        names += [
            ("builtins", "frozenset"),
            ("__builtin__", "bytes"),
            ("builtins", "bytes"),
            ("copy_reg", "_reconstructor"),
        ]
        check_pickle(pickle.dumps(value, protocol), "x", names)


def saved(value: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def test_what_torch_saved_is_followed_inside() -> None:
    check_saved(saved({"state": [torch.zeros(3, dtype=torch.bfloat16), OrderedDict(a=1.5)]}), "x")
    for value, words in (
        (Call(os.system, "true"), "posix system"),
        ([torch.zeros(2), Call(os.system, "true")], "posix system"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear Linear"),
    ):
        with pytest.raises(CheckpointError, match=f"common.pt: holds {words}"):
            check_saved(saved(value), "common.pt")


def test_other_formats_that_torch_reads_are_refused() -> None:
    old = io.BytesIO()
    torch.save({"a": 1}, old, _use_new_zipfile_serialization=False)
    old.seek(0)
    program = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Identity()), program)
    program.seek(0)
    torn = io.BytesIO(saved({"a": 1}).getvalue()[:-30])
    for file, words in ((old, "damaged: not a file of torch.save"), (program, "TorchScript"), (torn, "damaged")):
        with pytest.raises(CheckpointError, match=words):
            check_saved(file, "common.pt")


def test_a_second_pickle_in_the_zip_does_not_hide_the_first() -> None:
    """The one that torch reads counts, whatever other readers of zips would take."""
    evil = io.BytesIO(saved(Call(os.system, "true")).getvalue())
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(evil, "a") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    evil.seek(0)
    with pytest.raises(CheckpointError):
        check_saved(evil, "common.pt")


# --- whole checkpoints -----------------------------------------------------------------------------------------------


def one_saved(config: Config) -> None:
    """On a rank: a step and a checkpoint."""
    from megatron_refine.checkpoint.checkpoints import Progress

    step, checkpoints = start(config)
    step(part(0, step), 0, refine=False)
    checkpoints.save(Progress(1, 4, "rows"), step.updater)


@pytest.fixture(scope="module")
def real(ranks: Any, tmp_path_factory: Any) -> Iterator[dict[str, Path]]:
    """Checkpoints of every kind that we write: by layout, by precision, converted."""
    found: dict[str, Path] = {}
    for name, world, overrides in (
        ("fp32", 1, ["train.precision=fp32"]),
        ("bf16 tp2 sp", 2, ["train.precision=bf16", "parallel.tp=2", "parallel.sp=true"]),
        ("fp32 cp2 pp2", 4, ["parallel.cp=2", "parallel.pp=2", "train.micro_batch_size=1"]),
    ):
        folder = tmp_path_factory.mktemp("real")
        config = small_config(folder, "refine.enabled=false", *overrides)
        ranks(world, one_saved, config=config)
        found[name] = folder / "run/checkpoints/step_0000001"
    folder = tmp_path_factory.mktemp("converted")
    from megatron_refine.checkpoint.conversion import hf_to_megatron

    hf_to_megatron(hf_folder(folder / "hf"), folder / "fp32")
    hf_to_megatron(folder / "hf", folder / "fp16", torch.float16)
    yield found | {"converted": folder / "fp32", "converted to fp16": folder / "fp16"}


class Seen:
    """A list that allows everything and remembers it."""

    def __init__(self) -> None:
        self.names: set[tuple[str, str]] = set()

    def __contains__(self, name: Any) -> bool:
        self.names.add(name)
        return True


def files(folder: Path) -> dict[str, Any]:
    from megatron_refine.checkpoint.manifest import read_manifest

    found: dict[str, Any] = read_manifest(folder)["files"]
    return found


def test_all_that_we_write_passes_and_the_list_holds_no_more(
    real: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in real.values():
        check_pickles(folder, files(folder))
    in_metadata, in_saved = Seen(), Seen()
    monkeypatch.setattr(pickles, "IN_METADATA", in_metadata)
    monkeypatch.setattr(pickles, "IN_SAVED", in_saved)
    for folder in real.values():
        check_pickles(folder, files(folder))
    other = "pathlib" if sys.version_info >= (3, 13) else "pathlib._local"
    assert IN_METADATA - in_metadata.names == {("torch", "float64"), (other, "PosixPath")}
    assert IN_SAVED - in_saved.names == {("torch", "DoubleStorage")}


def poison_metadata(folder: Path, call: Call) -> str:
    (folder / ".metadata").write_bytes(pickle.dumps(call))
    return ".metadata"


def poison_common(folder: Path, call: Call) -> str:
    torch.save({"optimizer": call}, folder / "common.pt")
    return "common.pt"


def poison_piece(folder: Path, call: Call, key: str = "rng/") -> str:
    """Of one rank's random streams, or else of a tensor: where .metadata says that it stands."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    index = next(index for index in metadata.storage_data if index.fqn.startswith(key))
    place = metadata.storage_data[index]
    whole, evil = (folder / place.relative_path).read_bytes(), saved([torch.zeros(1), call]).getvalue()
    (folder / place.relative_path).write_bytes(whole + evil)
    place.offset, place.length = len(whole), len(evil)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return str(place.relative_path)


def poison_weights(folder: Path, call: Call) -> str:
    return poison_piece(folder, call, "embedding.")


POISONS = (poison_metadata, poison_common, poison_piece, poison_weights)


def poisoned(folder: Path, target: Path, poison: Callable[[Path, Call], str], mark: Path) -> str:
    """A copy with a valid manifest, that touches `mark` where it is read; the poisoned file."""
    shutil.copytree(folder, target)
    name = poison(target, Call(os.system, f"touch {mark}"))
    reseal(target, lambda manifest: None)
    return name


def roads(config: Config, folders: list[Path], run: Path) -> list[list[str]]:
    """On a rank: the errors of all roads by which a checkpoint enters, for each folder; and rng comes back."""
    from megatron_refine.checkpoint.conversion import MegatronSource
    from megatron_refine.checkpoint.source import find
    from megatron_refine.eval import load

    step, checkpoints = start(config)

    def evaluated(folder: Path) -> Any:
        source = find(folder)
        return load.load(source, load.layout(source), load.Text(folder, None, None))  # type: ignore[arg-type]

    found = []
    for folder in folders:
        tries: list[Callable[[], Any]] = [
            lambda f=folder: checkpoints.load(f, step.updater),  # type: ignore[misc]
            lambda f=folder: checkpoints.load_weights(find(f), step.updater),  # type: ignore[misc]
            lambda f=folder: MegatronSource(f),  # type: ignore[misc]
            lambda f=folder: evaluated(f),  # type: ignore[misc]
        ]
        errors = []
        for attempt in tries:
            with pytest.raises(CheckpointError) as error:
                attempt()
            errors.append(str(error.value))
        found.append(errors)
    checkpoints.load(run, step.updater)
    kept = torch.get_rng_state()
    torch.manual_seed(123)
    checkpoints.load(run, step.updater)
    assert torch.get_rng_state().equal(kept), "the same layout gets its random streams back"
    return found


def test_no_road_runs_anything_of_a_poisoned_checkpoint(ranks: Any, tmp_path: Path, real: dict[str, Path]) -> None:
    mark = tmp_path / "pwned"
    names = [poisoned(real["fp32"], tmp_path / p.__name__, p, mark) for p in POISONS]
    (tmp_path / "config").mkdir()
    config = small_config(tmp_path / "config", "refine.enabled=false")
    folders = [tmp_path / p.__name__ for p in POISONS]
    found = ranks(1, roads, config=config, folders=folders, run=real["fp32"])[0]
    for folder, name, errors in zip(folders, names, found, strict=True):
        for error in errors:
            assert error.startswith(f"{folder / name}: ") and "holds posix system" in error, error
    assert not mark.exists()


def change_metadata(folder: Path, change: Callable[[Metadata], object]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_every_piece_is_followed_by_one_rank(real: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = real["fp32"]
    stored = pickle.loads((folder / ".metadata").read_bytes()).storage_data.values()
    pieces = sorted(f"{folder / x.relative_path}: at {x.offset}" for x in stored)
    for shares in (1, 3):
        seen: list[str] = []
        monkeypatch.setattr(pickles, "check_saved", lambda file, where, seen=seen: seen.append(where))
        for share in range(shares):
            check_pickles(folder, files(folder), share, shares)
        assert sorted(where for where in seen if ": at " in where) == pieces


def first_place(metadata: Metadata) -> Any:
    return next(iter(metadata.storage_data.values()))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda m: setattr(first_place(m), "relative_path", "/etc/hostname"), "'/etc/hostname', which is no file of"),
        (lambda m: setattr(first_place(m), "relative_path", "../other/__0_0.distcp"), "which is no file of the checkp"),
        (
            lambda m: setattr(first_place(m), "transform_descriptors", ["stream.zstd/1"]),
            "a piece that .* does not hold",
        ),
        (lambda m: setattr(first_place(m), "offset", -5), "a piece that .* does not hold"),
        (lambda m: setattr(first_place(m), "length", 1 << 40), "a piece that .* does not hold"),
        (lambda m: setattr(first_place(m), "offset", "0"), r"damaged: TypeError"),
        (lambda m: setattr(m, "storage_data", None), r"damaged: AttributeError"),
    ],
)
def test_metadata_cannot_lead_out_of_the_folder(
    tmp_path: Path, real: dict[str, Path], change: Callable[[Metadata], object], words: str
) -> None:
    folder = tmp_path / "step_0000001"
    shutil.copytree(real["fp32"], folder)
    change_metadata(folder, change)
    with pytest.raises(CheckpointError, match=rf"\.metadata: .*{words}"):
        check_pickles(folder, files(folder))


@pytest.mark.parametrize("content", ["", "{}", '{"sharded_backend": "zarr", "sharded_backend_version": 1}'])
def test_another_format_is_refused(tmp_path: Path, real: dict[str, Path], content: str) -> None:
    folder = tmp_path / "step_0000001"
    shutil.copytree(real["fp32"], folder)
    (folder / "metadata.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"metadata\.json: (damaged|does not name the format of our checkpoints)"):
        check_pickles(folder, files(folder))


def test_no_pickle_of_ours_needs_a_registered_class() -> None:
    assert not copyreg._extension_registry  # type: ignore[attr-defined]
