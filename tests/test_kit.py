"""The folder for a GPU machine without network: built, and its stages run on the CPU with tiny models."""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_refine.platform import hardware

ROOT = Path(__file__).parents[1]
KIT = ROOT / "launch/kit"
GRACE = 2  # seconds that a stage is given to end
REHEARSED = ["facts", "parity", "delta", "lact-profile", "hf"]


def build(folder: Path, python: str = "", **settings: str) -> "subprocess.CompletedProcess[str]":
    line = [str(KIT / "build.sh"), str(folder), python]
    return subprocess.run(line, env=os.environ | settings, capture_output=True, encoding="utf-8")


def stages() -> dict[str, int]:
    """Each stage of the kit with its deadline in seconds."""
    text = (KIT / "run.sh").read_text(encoding="utf-8")
    return {name: int(limit) for name, limit in re.findall(r"^ +stage ([\w-]+) (\d+) ", text, re.MULTILINE)}


def test_all_stages_end_within_nine_minutes() -> None:
    assert next(iter(stages())) == "facts" and len(stages()) == 10
    assert sum(stages().values()) + GRACE * len(stages()) <= 9 * 60 - 10  # wheels and kernels are unpacked before


def test_a_kit_that_is_too_large_to_carry_is_refused(tmp_path: Path) -> None:
    """Its own folder is made anew; nothing else is touched."""
    done = build(tmp_path / "kit")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "kit").iterdir()} == {"wheels", "run.sh"}
    text = (KIT / "build.sh").read_text(encoding="utf-8").replace("64 << 20", "1")
    script = tmp_path / "a/b/build.sh"
    script.parent.mkdir(parents=True)
    script.write_text(text, encoding="utf-8")
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    done = subprocess.run(["bash", str(script), str(tmp_path / "kit")], capture_output=True, encoding="utf-8")
    assert done.returncode == 1 and "more than 1: carry fewer wheels or kernels" in done.stderr


def rehearse(kit: Path, folder: Path, names: str = "") -> Path:
    """The stages (of these names) with tiny models, on whatever this machine has. Returns the folder of results."""
    data = f"data.paths=[{argparse.__file__}] data.cache_dir={folder / 'data'} run.dir={folder / 'run'}"
    settings = {
        "PYTHON": sys.executable, "OUT": str(folder / "out"), "WORK": str(folder / "work"), "OMP_NUM_THREADS": "1",
        "DELTA": "model=delta_net_tiny model.vocab_size=512", "LACT": "model=lact_tiny model.vocab_size=512",
        "SIZE": f"data.seq_length=192 train.precision=fp32 {data}", "ROUNDS": "1",
        "SLACK": "10", "STAGES": names,
    }  # fmt: skip
    done = subprocess.run(["bash", str(kit / "run.sh")], cwd=ROOT, env=os.environ | settings, capture_output=True,
                          encoding="utf-8")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "out"


def codes(out: Path) -> dict[str, int]:
    """The exit code of each stage, in the order in which they ended."""
    text = (out / "results.txt").read_text(encoding="utf-8")
    return {name: int(code) for name, code in re.findall(r"^\[\d+ s\] end ([\w-]+), code (\d+)$", text, re.MULTILINE)}


def said(out: Path, name: str) -> str:
    return (out / f"{name}.txt").read_text(encoding="utf-8")


def check_what_a_cpu_can(out: Path) -> None:
    """Stages that need no GPU did their work; each of the others says in a line what it lacks, and stops nothing."""
    found = codes(out)
    assert list(found) == REHEARSED
    assert all(found[name] == 0 for name in ("facts", "delta", "lact-profile"))
    assert all(word in said(out, "facts") for word in ("TFLOP/s", "TB/s", "us (an operation", "torch "))
    assert "two-pass" in said(out, "delta")
    assert "skipped" in said(out, "parity")
    assert found["hf"] == 2 and said(out, "hf").splitlines()[-1].startswith("--hf: ")
    assert "two-pass" in (out / "results.txt").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_stages_run_without_a_gpu(tmp_path: Path) -> None:
    """One of each kind, in processes that import PyTorch. Neither wheels nor kernels are carried."""
    if hardware.has_gpu():
        pytest.skip("there is a GPU: bash .gpu-kit/run.sh is the real thing")
    assert build(tmp_path / "kit").returncode == 0
    check_what_a_cpu_can(rehearse(tmp_path / "kit", tmp_path, " ".join(REHEARSED)))


@pytest.mark.kernels
def test_the_kit_carries_kernels_that_are_found_again(tmp_path: Path) -> None:
    """Compiled here for a GPU that is not there; where they are unpacked, nothing of them is compiled again."""
    settings = {
        "MODELS": "", "OTHERS": "delta_net_tiny", "WHEELS": "", "JOBS": "2",
        "SIZE": "data.seq_length=192 train.precision=fp32",
    }  # fmt: skip
    done = build(tmp_path / "kit", sys.executable, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    out = rehearse(tmp_path / "kit", tmp_path, "cache")
    assert codes(out) == {"cache": 0} and ": 0 compiled, " in said(out, "cache"), said(out, "cache")
