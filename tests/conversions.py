"""What the tests of conversions share: the command in a rank, folders to convert, ways to change them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_refine.convert.fields import fresh_config
from megatron_refine.convert.mapping import Converter
from tests.runs import End, _captured

GOLDEN = Path(__file__).parent / "golden"
TEXTS = {
    "generation_config.json": '{"bos_token_id": 1}',
    "tokenizer.json": '{"model": "\\u00e9"}',
    "tokenizer_config.json": "{}",
    "README.md": "of a model",
}


def convert(arguments: list[str], patch: Callable[[], None] | None = None) -> End:
    """On a rank: the command; `patch` breaks something first."""
    from megatron_refine.cli.convert import main

    if patch:
        patch()
    with _captured() as texts:
        code = main(arguments)
    return End(code, *texts)


def to_megatron(hf: Path, megatron: Path, *options: str) -> list[str]:
    return ["hf-to-megatron", "--hf", str(hf), "--megatron", str(megatron), *options]


def to_hf(megatron: Path, hf: Path, *options: str) -> list[str]:
    return ["megatron-to-hf", "--megatron", str(megatron), "--hf", str(hf), *options]


def hf_folder(path: Path, name: str = "delta_net", **fields: Any) -> Path:
    """A golden checkpoint as a model folder, with a tokenizer; `fields` change its config.json."""
    path.mkdir(parents=True)
    shutil.copy(GOLDEN / name / "model.safetensors", path)
    config = json.loads((GOLDEN / name / "config.json").read_text(encoding="utf-8")) | fields
    (path / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    for file, text in TEXTS.items():
        (path / file).write_text(text, encoding="utf-8")
    return path


def write_random(path: Path, model: Any) -> None:
    """A model of random weights, as the library would save it."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(fresh_config(model, "float32")), encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    shapes = Converter(model).hf_shapes.items()
    tensors = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a folder's model.safetensors, in place or by returning others."""
    tensors = load_file(path / "model.safetensors")
    changed = change(tensors)
    save_file(changed if isinstance(changed, dict) else tensors, path / "model.safetensors", {"format": "pt"})


def shard_in_two(path: Path) -> None:
    """Replace model.safetensors by two files and their index, as transformers writes them."""
    tensors = load_file(path / "model.safetensors")
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, own in files.items():
        save_file({name: tensors[name] for name in own}, path / file, {"format": "pt"})
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": {n: f for f, own in files.items() for n in own}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (path / "model.safetensors").unlink()


def contents(path: Path) -> dict[str, bytes]:
    """Every file of a folder but the hashes that a conversion adds."""
    return {p.name: p.read_bytes() for p in path.iterdir() if p.name != "checksums.json"}


def tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a model folder, read by the library."""
    return {name: t for file in sorted(path.glob("*.safetensors")) for name, t in load_file(file).items()}


def in_bf16(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.to(torch.bfloat16) for name, t in found.items()}
