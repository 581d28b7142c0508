"""Extras of setup.py: what is installed in a wrong version is said in a line, and what they ask for can be had."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_refine import extras
from megatron_refine.config import ConfigError

ROOT = Path(__file__).parents[1]
CORE, TORCH = "transformer_engine_cu13", "transformer_engine_torch"
# what pip says without a network, and of an index that has not all of CUDA's packages
ABSENT = re.compile(
    r"No matching distribution found for (nvidia|cuda)-.*|Max retries exceeded.*"
    r"|(Connection|Network) (refused|is unreachable|timed out|broken).*"
)


def installed(folder: Path, **versions: str) -> Path:
    """A folder with packages of these versions, whose import fails as that of a wrong Transformer Engine does."""
    for name, version in versions.items():
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        metadata = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
        (info / "METADATA").write_text(metadata, encoding="utf-8")
    module = "fla" if "flash_linear_attention" in versions else "transformer_engine"
    (folder / module).mkdir(parents=True, exist_ok=True)
    (folder / module / "__init__.py").write_text("raise AssertionError('no core')\n", encoding="utf-8")
    return folder


WHOLE = {"transformer_engine": "2.11.0", CORE: "2.11.0", TORCH: "2.11.0"}


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        (dict.fromkeys(WHOLE, "2.20.2"), "transformer-engine 2.20.2 is installed, and Megatron-Core takes <2.12,>=2.9"),
        (WHOLE | {TORCH: "2.10.0"}, "its parts are of different versions: transformer-engine 2.11.0, "),
        ({"transformer_engine": "2.11.0", TORCH: "2.11.0"}, "transformer-engine-cu13 is missing"),
        ({"transformer_engine": "2.11.0", CORE: "2.11.0"}, "transformer-engine-torch is missing"),
        (WHOLE, ""),
        ({"transformer_engine": "2.11.0", "transformer_engine_cu12": "2.11.0", TORCH: "2.11.0"}, ""),
    ],
)
def test_a_transformer_engine_that_cannot_be_used_is_named(
    versions: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(installed(tmp_path, **versions))
    if not message:
        return extras.check_transformer_engine()
    with pytest.raises(ConfigError) as caught:
        extras.check_transformer_engine()
    assert message in str(caught.value) and "pip install --no-build-isolation '.[te]'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_transformer_engine_that_was_built_from_a_checkout_has_no_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(installed(tmp_path, transformer_engine="2.11.0+abc"))
    (tmp_path / "transformer_engine/libtransformer_engine.so").touch()
    (tmp_path / "transformer_engine_torch.cpython-312-x86_64-linux-gnu.so").touch()
    extras.check_transformer_engine()


@pytest.mark.parametrize(
    "line",
    [
        ["train", "--config", "configs/bench.yaml"],
        ["bench", "step", "--config", "configs/bench.yaml"],
        ["generate", "tests/golden/delta_net", "--prompt", "a"],
        ["convert", "hf-to-megatron", "--hf", "tests/golden/delta_net", "--megatron", "nowhere/out"],
        ["parity", "tests/golden/delta_net"],
    ],
    ids=lambda line: line[0],
)
def test_commands_say_it_before_it_is_imported(line: list[str], tmp_path: Path) -> None:
    folder = installed(tmp_path, **dict.fromkeys(WHOLE, "2.20.2"))
    environment = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}"}
    done = subprocess.run([sys.executable, "-m", "megatron_refine", *line], cwd=ROOT, env=environment,
                          capture_output=True, encoding="utf-8")  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("Transformer Engine: transformer-engine"), done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({}, "flash-linear-attention is not installed.*pip install"),
        ({"flash_linear_attention": "0.5.2"}, "attention 0.5.2 is installed.*pip install 'flash-.*==0.6.0'"),
        ({"flash_linear_attention": extras.FLA}, ""),
    ],
)
def test_flash_linear_attention_is_the_version_that_was_tried(
    versions: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if versions:
        monkeypatch.syspath_prepend(installed(tmp_path, **versions))
    elif extras._version("flash-linear-attention"):
        pytest.skip("it is installed here")
    if not message:
        return extras.check_fla()
    with pytest.raises(ConfigError, match=message):
        extras.check_fla()


def stated() -> dict[str, list[str]]:
    """Requirements as setup.py states them: its own, and those of each extra."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    call = next(n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "setup")
    own = next(ast.literal_eval(k.value) for k in call.keywords if k.arg == "install_requires")
    table = next(n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "EXTRAS")  # type: ignore[attr-defined]
    lists = [(k.value, v) for k, v in zip(table.keys, table.values, strict=True)]  # type: ignore[attr-defined]
    return {"": own} | {name: ast.literal_eval(v) for name, v in lists if name in ("gpu", "te", "wandb", "docs")}


def test_setup_pins_what_is_checked() -> None:
    found = stated()
    assert found["gpu"] == [f"flash-linear-attention=={extras.FLA}"]
    version = re.fullmatch(r"transformer-engine\[core_cu13,pytorch\]==([\d.]+)", found["te"][0])
    assert version and extras.TE.contains(version[1])
    assert not any("flash-attn" in requirement for extra in found.values() for requirement in extra)


@pytest.mark.slow
def test_extras_resolve_for_a_gpu_machine(tmp_path: Path) -> None:
    """Wheels alone, for Linux x86-64 and Python 3.12; all but `te`, whose half for PyTorch is there as source only."""
    report, found = tmp_path / "report.json", stated()
    tags = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
    line = [
        sys.executable, "-m", "pip", "install", "--dry-run", "--use-feature=fast-deps", "--ignore-installed",
        "--only-binary", ":all:", "--python-version", "3.12", *(word for tag in tags for word in ("--platform", tag)),
        "--target", str(tmp_path / "target"), "--report", str(report), "--retries", "1", "--timeout", "20",
    ]  # fmt: skip
    every = [requirement for name in ("", "gpu", "wandb", "docs") for requirement in found[name]]
    for wanted in ([each for each in every if each.startswith("torch")], every):  # at first what an index may lack
        done = subprocess.run([*line, *wanted], capture_output=True, encoding="utf-8", timeout=600)
        if reason := ABSENT.search(done.stderr):
            pytest.skip(f"the package index does not answer, or lacks a part of PyTorch: {reason.group()}")
    assert done.returncode == 0, done.stderr
    names = {item["metadata"]["name"].lower(): item["metadata"]["version"]
             for item in json.loads(report.read_text(encoding="utf-8"))["install"]}  # fmt: skip
    assert names["torch"].startswith("2.13.") and "triton" in names and "transformer-engine" not in names
    assert names["flash-linear-attention"] == extras.FLA
