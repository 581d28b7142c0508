"""What is wrong with a model or a checkpoint, told by name: tensors, files; nothing half-written is left."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_refine.checkpoint.source import refuse_existing
from megatron_refine.config import ConfigError
from megatron_refine.convert.errors import ConversionError
from megatron_refine.convert.source import HFSource
from megatron_refine.files import fingerprint
from tests.conversions import GOLDEN, TEXTS, convert, hf_folder, rewrite, shard_in_two, tensors, to_hf, to_megatron
from tests.runs import End

DOWN = "model.layers.1.mlp.down_proj.weight"


def flip_bit(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda found: {n: t for n, t in found.items() if n != name})


def with_tensor(name: str, make: Callable[[dict[str, Tensor]], Tensor]) -> Callable[[Path], None]:
    return lambda folder: rewrite(
        folder, lambda found: found | {name: make(found).clone(memory_format=torch.contiguous_format)}
    )


def with_index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        shard_in_two(folder)
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text(encoding="utf-8"))
        change(index["weight_map"])
        path.write_text(json.dumps(index), encoding="utf-8")

    return apply


def in_header(before: bytes, after: bytes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        assert len(before) == len(after) and before in data[:10_000]
        path.write_bytes(data.replace(before, after, 1))

    return apply


def change_file(name: str, change: Callable[[Path], Any]) -> Callable[[Path], None]:
    return lambda folder: change(folder / name)


def two(then: Callable[[Path], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        shard_in_two(folder)
        then(folder)

    return apply


SECOND = "model-00002-of-00002.safetensors"
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (without(DOWN), rf"missing {DOWN}; check the configuration"),
    "left over": (with_tensor("model.extra", lambda f: f[DOWN]), r"not known model\.extra; check the configuration"),
    "misnamed": (
        lambda folder: rewrite(folder, lambda f: {n.replace("down_proj", "down"): t for n, t in f.items()}),
        r"missing model\.layers\.0\.mlp\.down_proj\.weight, .*; not known model\.layers\.0\.mlp\.down\.weight",
    ),
    "both names": (
        with_tensor("model.layers.0.attn.norm.weight", lambda f: f["model.layers.0.attn.o_norm.weight"]),
        r"not known model\.layers\.0\.attn\.norm\.weight",
    ),
    "shape": (with_tensor(DOWN, lambda f: f[DOWN].T), rf"{DOWN}: shape \[96, 64\], the configuration says \[64, 96\]"),
    "dtype": (with_tensor(DOWN, lambda f: f[DOWN].long()), rf"{DOWN}: dtype I64 cannot be converted; known are F64, "),
    "nan": (with_tensor(DOWN, lambda f: f[DOWN] / 0), rf"model\.safetensors: {DOWN}: has NaN or infinite values"),
    "truncated": (change_file("model.safetensors", cut), r"model\.safetensors: truncated: \d+ bytes, its header says"),
    "truncated in the header": (
        change_file("model.safetensors", lambda p: p.write_bytes(p.read_bytes()[:500])),
        r"model\.safetensors: truncated: 500 bytes, the header alone has",
    ),
    "empty": (change_file("model.safetensors", lambda p: p.write_bytes(b"")), r"damaged: no safetensors header"),
    "longer": (
        change_file("model.safetensors", lambda p: p.write_bytes(p.read_bytes() + b"12")), r"damaged: \d+ bytes, its"
    ),
    "no JSON": (in_header(b'"dtype"', b'"dtype\x00'), r"model\.safetensors: damaged: no safetensors header"),
    "nested too deeply": (
        change_file("model.safetensors", lambda p: p.write_bytes((10**5).to_bytes(8, "little") + b"[" * 10**5)),
        r"damaged: no safetensors header",
    ),
    "offsets": (in_header(b'"shape":[97,64]', b'"shape":[96,64]'), r"weight: damaged: its shape and offsets do not"),
    "no weights": (change_file("model.safetensors", Path.unlink), r"no safetensors files; save the model with"),
    "stray": (
        lambda folder: shutil.copy(folder / "model.safetensors", folder / "model-00002-of-00002.safetensors") and None,
        r"model-00002-of-00002\.safetensors: is neither model\.safetensors nor listed in model\..*json; move it away",
    ),
    "no shard": (two(lambda folder: (folder / SECOND).unlink()), rf"{SECOND}: missing; fetch it again"),
    "not listed": (with_index(lambda m: m.pop(DOWN)), rf"index\.json: {DOWN}: is in a file, but not in the index"),
    "listed, not there": (
        with_index(lambda m: m.update({"model.more": SECOND})), rf"model\.more: is not in {SECOND}"
    ),
    "listed elsewhere": (
        with_index(lambda m: m.update({"lm_head.weight": SECOND})),
        rf"lm_head\.weight: is in model-00001.*, not in {SECOND}",
    ),
    "an index of numbers": (with_index(lambda m: m.update({DOWN: 2})), r"index\.json: has no weight_map of names"),
    "no index": (
        two(lambda folder: (folder / "model.safetensors.index.json").write_text("[]", encoding="utf-8")),
        r"index\.json: has no weight_map of names to files",
    ),
}  # fmt: skip


def refused(end: End, code: int, pattern: str) -> None:
    """The exit code, and one line that matches."""
    assert end.code == code, end
    assert len(end.err.splitlines()) == 1 and re.search(pattern, end.err), end.err


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_weights_are_refused_by_name(ranks: Any, tmp_path: Path, case: str) -> None:
    damage, pattern = DAMAGE[case]
    source = hf_folder(tmp_path / "source")
    damage(source)
    if case == "nan":  # the one that needs the tensors themselves: seen in the middle of writing
        refused(ranks(1, convert, arguments=to_megatron(source, tmp_path / "megatron"))[0], 4, pattern)
    else:
        with pytest.raises(ConversionError) as error:
            HFSource(source)
        assert re.search(f"^{tmp_path}.*{pattern}", str(error.value)) and "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_the_command_ends_with_one_line(ranks: Any, tmp_path: Path) -> None:
    """2 for a configuration, 4 for weights; the target is as it was."""
    source, megatron = hf_folder(tmp_path / "source"), tmp_path / "megatron"

    def run(arguments: list[str]) -> End:
        return ranks(1, convert, arguments=arguments)[0]

    refused(run(to_megatron(tmp_path / "none", megatron)), 2, "none: no such folder; name a run")
    megatron.mkdir()
    (megatron / "notes").write_text("mine", encoding="utf-8")
    refused(run(to_megatron(source, megatron)), 2, rf"^{megatron}: exists and is not empty; name a new folder")
    assert [p.name for p in megatron.iterdir()] == ["notes"]
    (megatron / "notes").unlink()  # an empty folder is taken
    assert run(to_megatron(source, megatron)).code == 0
    refused(run(to_hf(megatron, source)), 2, rf"^{source}: exists and is not empty")
    arguments = to_hf(megatron, tmp_path / "back", "--max-shard-size", "many")
    refused(run(arguments), 2, r"--max-shard-size many: not a size; write 5GB, 500MB or a number of bytes")
    (source / "config.json").write_text("{", encoding="utf-8")
    refused(run(to_megatron(source, tmp_path / "m")), 2, r"config\.json: not valid JSON")
    shutil.copy(GOLDEN / "delta_net/config.json", source / "config.json")
    cut(source / "model.safetensors")
    refused(run(to_megatron(source, tmp_path / "m")), 4, r"model\.safetensors: truncated")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["megatron", "source"]


def full_disk() -> None:
    """On a rank: no room."""
    shutil.disk_usage = lambda path: shutil._ntuple_diskusage(100, 99, 1)  # type: ignore[attr-defined,assignment]


def failing_file() -> None:
    """On a rank: the disk fails in the middle of a file."""
    from megatron_refine.convert.tensorfile import TensorFileWriter

    def write(self: Any, name: str, tensor: Tensor) -> None:
        raise OSError(28, "No space left on device", str(self.path))

    TensorFileWriter.write = write  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def converted(ranks: Any, tmp_path_factory: Any) -> Path:
    """A converted checkpoint, to copy."""
    folder = tmp_path_factory.mktemp("converted")
    source = hf_folder(folder / "source")
    assert ranks(1, convert, arguments=to_megatron(source, folder / "megatron"))[0].code == 0
    return folder / "megatron"


def test_a_disk_that_is_full(ranks: Any, tmp_path: Path, converted: Path) -> None:
    for patch, pattern in ((full_disk, "back: disk full: the weights take"), (failing_file, "No space left on device")):
        refused(ranks(1, convert, arguments=to_hf(converted, tmp_path / "back"), patch=patch)[0], 4, pattern)
        assert not list(tmp_path.iterdir())


def test_what_a_killed_conversion_left_is_not_in_the_way(ranks: Any, tmp_path: Path, converted: Path) -> None:
    (tmp_path / ".incomplete-back").mkdir()
    (tmp_path / ".incomplete-back/model.safetensors").write_bytes(b"half")
    assert ranks(1, convert, arguments=to_hf(converted, tmp_path / "back"))[0].code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["back"]


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """On a rank: the checkpoint with other tensors, sealed anew."""
    from megatron_refine.checkpoint import manifest
    from megatron_refine.checkpoint.plain import PlainReader, Spec, write_plain

    reader = PlainReader(folder)
    found: dict[str, Any] = {name: reader[name] for name in reader.specs}
    change(found)
    (folder / "__0_0.distcp").unlink()
    write_plain(folder, {n: Spec(t.dtype, tuple(t.shape)) for n, t in found.items()}, found.__getitem__)
    contents = manifest.read_manifest(folder)
    contents["files"] = {name: fingerprint(folder / name) for name in manifest.payload(folder)}
    manifest.complete(folder, contents)


OURS = "decoder.layers.1.mlp.linear_fc2.weight"


def put_nan(found: dict[str, Any]) -> None:
    found[OURS][3, 4] = float("nan")


def take_norm(found: dict[str, Any]) -> None:
    del found["decoder.final_layernorm.weight"]


def add_tensor(found: dict[str, Any]) -> None:
    found["decoder.more"] = torch.ones(3)


def turn(found: dict[str, Any]) -> None:
    for i in range(2):
        found[f"decoder.layers.{i}.mlp.linear_fc2.weight"] = found[
            f"decoder.layers.{i}.mlp.linear_fc2.weight"
        ].T.clone()


OTHERS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "nan": (put_nan, rf"{OURS}: has NaN or infinite values; take an earlier checkpoint"),
    "missing": (take_norm, r"missing decoder\.final_layernorm\.weight"),
    "left over": (add_tensor, r"not known decoder\.more"),
    "shape": (turn, r"linear_fc2\.weight: shape \[96, 64\], the configuration says \[64, 96\]"),
}
FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "bit": (lambda folder: flip_bit(folder / "__0_0.distcp"), r"__0_0\.distcp: damaged: sha256 differs"),
    "truncated": (lambda folder: cut(folder / "__0_0.distcp"), r"__0_0\.distcp: truncated: \d+ bytes of"),
    "tokenizer": (
        lambda folder: flip_bit(folder / "hf/tokenizer.json"),
        r"hf/tokenizer\.json: damaged: sha256 differs",
    ),
    "no file": (lambda folder: (folder / "__0_0.distcp").unlink(), r"__0_0\.distcp: missing"),
    "not complete": (lambda folder: (folder / "COMPLETE").unlink(), r"not a complete checkpoint: No such file"),
    "manifest": (lambda folder: flip_bit(folder / "manifest.json"), r"manifest\.json: damaged"),
}


@pytest.mark.parametrize("case", [*FILES, *OTHERS])
def test_a_damaged_checkpoint_is_refused_by_name(ranks: Any, tmp_path: Path, converted: Path, case: str) -> None:
    megatron = tmp_path / "megatron"
    shutil.copytree(converted, megatron)
    if case in FILES:
        damage, pattern = FILES[case]
        damage(megatron)
    else:
        change, pattern = OTHERS[case]
        ranks(1, rewritten, folder=megatron, change=change)
    refused(ranks(1, convert, arguments=to_hf(megatron, tmp_path / "back"))[0], 4, rf"^{megatron}.*{pattern}")
    assert [p.name for p in tmp_path.iterdir()] == ["megatron"]


def test_a_flipped_bit_in_a_model_written_here(ranks: Any, tmp_path: Path, converted: Path) -> None:
    """Where hashes are known, they are checked; without them a bit of a float is as good as another."""
    back = tmp_path / "back"
    assert ranks(1, convert, arguments=to_hf(converted, back))[0].code == 0
    HFSource(back)
    flip_bit(back / "model.safetensors", 0.9)
    with pytest.raises(
        ConversionError, match=r"model\.safetensors: damaged: not what checksums\.json says; convert again"
    ):
        HFSource(back)
    cut(back / "model.safetensors")
    with pytest.raises(ConversionError, match=r"model\.safetensors: truncated: not what checksums\.json says"):
        HFSource(back)
    (back / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"model\.safetensors: missing; checksums\.json lists it"):
        HFSource(back)


def test_values_beyond_the_range_of_a_cast(ranks: Any, tmp_path: Path) -> None:
    source = hf_folder(tmp_path / "source")
    rewrite(source, lambda found: found[DOWN][0].fill_(1e6))
    end = ranks(1, convert, arguments=to_megatron(source, tmp_path / "megatron", "--dtype", "fp16"))[0]
    refused(end, 4, rf"{OURS}: has values beyond the range of torch\.float16; convert with another --dtype")


def resumed(config: Any, source: Path) -> str:
    """On a rank: what a run says whose newest checkpoint holds weights alone."""
    from megatron_refine.errors import CheckpointError
    from tests.test_checkpoint import start

    step, checkpoints = start(config)
    with pytest.raises(CheckpointError) as error:
        checkpoints.load(source, step.updater)
    return str(error.value)


def test_a_conversion_in_a_run_folder_is_not_taken_for_its_checkpoint(
    ranks: Any, tmp_path: Path, converted: Path
) -> None:
    from tests.test_convert import run_config

    config = run_config(tmp_path, "delta_net")
    folder = tmp_path / "run/checkpoints/step_0000004"
    shutil.copytree(converted, folder)
    message = ranks(1, resumed, config=config, source=folder)[0]
    assert re.search(rf"^{folder}: holds weights only, so a run cannot resume from it; .*checkpoint\.load=", message)
    end = ranks(1, convert, arguments=to_hf(tmp_path / "run", tmp_path / "back"))[0]
    assert (end.code, end.out) == (0, f"wrote {tmp_path}/back, from {folder}\n")
    assert sorted(p.name for p in (tmp_path / "back").iterdir()) == sorted([*TEXTS, "checksums.json", "config.json",
                                                                            "model.safetensors"])  # fmt: skip


def test_two_conversions_have_the_same_tensors(ranks: Any, tmp_path: Path, converted: Path) -> None:
    """`back` may be converted again: its hashes do not count as part of the model."""
    for i in (1, 2):
        source = converted if i == 1 else tmp_path / "m1"
        commands = [to_hf(source, tmp_path / f"b{i}"), to_megatron(tmp_path / f"b{i}", tmp_path / f"m{i}")]
        assert [ranks(1, convert, arguments=command)[0].code for command in commands] == [0, 0]
    first, second = tensors(tmp_path / "b1"), tensors(tmp_path / "b2")
    assert first.keys() == second.keys() and all(second[n].equal(t) for n, t in first.items())


@pytest.mark.parametrize("content", ['{"model.safetensors": "01ab"}', '["model.safetensors"]', '{"a": {"size": 1}}'])
def test_another_programs_checksums_are_left_alone(tmp_path: Path, content: str) -> None:
    """They are a file like others: kept, not compared."""
    from megatron_refine.convert.hf_folder import HFFolder

    source = hf_folder(tmp_path / "hf")
    (source / "checksums.json").write_text(content, encoding="utf-8")
    assert "checksums.json" in [path.name for path in HFFolder(source).other_files()]


def test_nothing_that_is_there_is_written_over(tmp_path: Path) -> None:
    """A file, a folder with something in it, a link to nowhere. An empty folder is taken."""
    (tmp_path / "empty").mkdir()
    refuse_existing(tmp_path / "new")
    refuse_existing(tmp_path / "empty")
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/.hidden").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "full", "link"):
        with pytest.raises(ConfigError, match=f"{name}: exists and is not empty; name a new folder"):
            refuse_existing(tmp_path / name)
