"""Safetensors files, as the library writes and reads them, byte by byte; and how they stood where a model came from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_refine.convert.errors import ConversionError
from megatron_refine.convert.hf_folder import INDEX, WEIGHTS, HFFolder, write_checksums
from megatron_refine.convert.hf_writer import HFWriter, Origin, Shard, sharded
from megatron_refine.convert.tensorfile import Spec, TensorFile, TensorFileWriter

METADATA = {"format": "pt", "note": "größer"}


def by_hand(path: Path, offsets: dict[str, tuple[int, int]], size: int) -> Path:
    """A file of fp32 scalars at these offsets, and `size` bytes of data."""
    entries = {n: {"dtype": "F32", "shape": [1], "data_offsets": list(place)} for n, place in offsets.items()}
    header = json.dumps(entries).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    return path


@pytest.mark.parametrize("name", ["w", "gewichte.größe", "层.0"])
def test_a_file_is_the_librarys_to_the_byte(tmp_path: Path, name: str) -> None:
    """Names and metadata beyond ASCII too, and a header of any length."""
    tensor = torch.randn(3, 5)
    save_file({name: tensor}, tmp_path / "theirs.safetensors", METADATA)
    writer = TensorFileWriter(tmp_path / "ours.safetensors", {name: Spec(tensor.dtype, (3, 5))}, METADATA)
    writer.write(name, tensor)
    theirs, ours = (json.loads(header(tmp_path / f"{who}.safetensors")) for who in ("theirs", "ours"))
    assert ours == theirs and load_file(tmp_path / "ours.safetensors")[name].equal(tensor)
    assert len(header(tmp_path / "ours.safetensors")) == len(header(tmp_path / "theirs.safetensors"))
    read = TensorFile(tmp_path / "theirs.safetensors")
    assert read.metadata == METADATA and read.read(name).equal(tensor)


def header(path: Path) -> bytes:
    data = path.read_bytes()
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


@pytest.mark.parametrize(
    "offsets",
    [
        {"a": (0, 4), "b": (2, 6), "c": (8, 12)},  # shares bytes with a, then leaves some out
        {"a": (4, 8), "b": (8, 12), "c": (12, 16)},
        {"a": (0, 4), "b": (0, 4), "c": (4, 8)},
    ],
)
def test_tensors_fill_a_file_without_gaps_and_overlaps(tmp_path: Path, offsets: dict[str, tuple[int, int]]) -> None:
    assert by_hand(tmp_path / "good", {"a": (0, 4), "b": (4, 8), "c": (8, 12)}, 12) and TensorFile(tmp_path / "good")
    with pytest.raises(ConversionError, match=r"bad: [abc]: damaged: its shape and offsets do not agree"):
        TensorFile(by_hand(tmp_path / "bad", offsets, 12))


def test_a_file_that_gets_shorter_after_it_was_looked_at(tmp_path: Path) -> None:
    path = by_hand(tmp_path / "x", {"a": (0, 4), "b": (4, 8)}, 8)
    file = TensorFile(path)
    path.write_bytes(path.read_bytes()[:-2])
    assert file.read("a").equal(torch.zeros(1))
    with pytest.raises(ConversionError, match="truncated within b; fetch it again"):
        file.read("b")


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\0" * 8, b"\xff" * 8 + b"{}"])
def test_what_has_no_header(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ConversionError, match="x: damaged: no safetensors header"):
        TensorFile(tmp_path / "x")


def test_a_file_with_more_or_fewer_bytes_than_its_header_says(tmp_path: Path) -> None:
    places = {"a": (0, 4), "b": (4, 8)}
    for size, what in ((9, "damaged"), (7, "truncated")):
        with pytest.raises(ConversionError, match=f"x: {what}: [0-9]+ bytes, its header says [0-9]+"):
            TensorFile(by_hand(tmp_path / "x", places, size))
    path = by_hand(tmp_path / "y", places, 0)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ConversionError, match="y: truncated: [0-9]+ bytes, the header alone has"):
        TensorFile(path)


ORIGIN: dict[str, Any] = {
    "shards": {
        "model-1.safetensors": {"tensors": ["old.a", "b"], "metadata": None},
        "model-2.safetensors": {"tensors": ["unused"], "metadata": {"format": "pt"}},
    },
    "dtypes": {"old.a": "F32", "b": "BF16", "unused": "F16"},
    "stored": {"a": "old.a", "b": "b"},
}


def renamed(file: str) -> Callable[[Any], None]:
    return lambda tree: tree["shards"].update({file: tree["shards"].pop("model-2.safetensors")})


OTHERS: dict[str, Callable[[Any], object]] = {
    "a tensor more": lambda tree: tree["stored"].update(c="b"),
    "a tensor less": lambda tree: tree["stored"].pop("b"),
    "another tensor": lambda tree: tree["stored"].update({"x": tree["stored"].pop("b")}),
    "a name twice": lambda tree: tree["shards"]["model-1.safetensors"]["tensors"].append("b"),
    "no dtype": lambda tree: tree["dtypes"].pop("unused"),
    "a dtype more": lambda tree: tree["dtypes"].update(y="F32"),
    "a dtype that is none": lambda tree: tree["dtypes"].update(b="I64"),
    "a file elsewhere": renamed("../model-2.safetensors"),
    "a file of another kind": renamed("config.json"),
    "no shards": lambda tree: tree.pop("shards"),
    "a shard that is none": lambda tree: tree["shards"].update({"model-2.safetensors": 3}),
}


@pytest.mark.parametrize("case", ["none", *OTHERS])
def test_where_tensors_stood_is_believed_of_this_model_alone(tmp_path: Path, case: str) -> None:
    tree = json.loads(json.dumps(ORIGIN))
    if case != "none":
        OTHERS[case](tree)
    (tmp_path / "origin.json").write_text(json.dumps(tree), encoding="utf-8")
    if case == "none":
        assert Origin.read(tmp_path / "origin.json", ["a", "b"], ["unused"]).to_json() == ORIGIN
        return
    with pytest.raises(ConversionError, match="does not belong to this model; copy the checkpoint again"):
        Origin.read(tmp_path / "origin.json", ["a", "b"], ["unused"])


@pytest.mark.parametrize(
    ("limit", "groups"), [(20, [5]), (8, [2, 2, 1]), (7, [1] * 5), (1, [1] * 5), (12, [3, 2]), (16, [4, 1])]
)
def test_shards_hold_as_much_as_fits(limit: int, groups: list[int]) -> None:
    """Five tensors of four bytes; one that is larger than a shard has one of its own."""
    found = sharded({f"t{i}": Spec(torch.float32, (1,)) for i in range(5)}, limit)
    assert [len(shard.tensors) for shard in found.values()] == groups
    assert [name for shard in found.values() for name in shard.tensors] == [f"t{i}" for i in range(5)]


@pytest.mark.parametrize("files", [[WEIGHTS], ["other.safetensors"], ["a.safetensors", "b.safetensors"]])
def test_an_index_is_written_where_readers_need_one(tmp_path: Path, files: list[str]) -> None:
    """Unless all is in the one file that they look for."""
    specs = {file: Spec(torch.float16, (3,)) for file in files}
    writer = HFWriter(tmp_path, specs, {file: Shard([file]) for file in files})
    for file in files:
        writer.write(file, torch.ones(3, dtype=torch.float16))
    writer.finish()
    if files == [WEIGHTS]:
        assert not (tmp_path / INDEX).exists()
        return
    index = json.loads((tmp_path / INDEX).read_text(encoding="utf-8"))
    assert index == {"metadata": {"total_size": 6 * len(files)}, "weight_map": {file: file for file in files}}


def test_a_whole_file_comes_before_an_index_beside_it(tmp_path: Path) -> None:
    """An index that save_pretrained left from an earlier save says nothing, as for transformers."""
    save_file({"w": torch.ones(2)}, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / INDEX).write_text('{"weight_map": {"w": "model-00001-of-00002.safetensors"}}', encoding="utf-8")
    folder = HFFolder(tmp_path)
    assert folder.index is None and folder["w"].equal(torch.ones(2))


def test_what_belongs_to_a_model_beside_its_weights(tmp_path: Path) -> None:
    """Not what is hidden, nor our own checksums; another program's file of their name is one of the model's."""
    save_file({"w": torch.ones(2)}, tmp_path / WEIGHTS)
    names = ["config.json", "modeling.py", "tokenizer.json"]
    for name in [*names, ".cache", "pytorch_model.bin", "other.index.json"]:
        (tmp_path / name).write_text("{}", encoding="utf-8")
    (tmp_path / ".git").mkdir()
    (tmp_path / "checksums.json").write_text('{"config.json": "md5:0"}', encoding="utf-8")
    assert [path.name for path in HFFolder(tmp_path).other_files()] == sorted([*names, "checksums.json"])
    (tmp_path / "checksums.json").unlink()
    (tmp_path / ".git").rmdir()
    write_checksums(tmp_path)
    assert [path.name for path in HFFolder(tmp_path).other_files()] == names
