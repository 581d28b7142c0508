"""What the platform repairs in Megatron-Core, and when."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_refine.platform import hardware
from megatron_refine.platform.megatron import streams
from megatron_refine.platform.megatron.install import install

ROOT = Path(__file__).parents[1]
IMPORTS = """
import importlib, pkgutil, sys, torch
own = {name: getattr(torch, name) for name in ("zeros", "empty", "tensor", "arange", "compile")}
kinds = torch.Tensor.cuda, torch.Tensor.type, torch.cuda.current_device, torch.cuda.synchronize
for name in sys.argv[1:]:
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(getattr(package, "__path__", ()), name + "."):
        importlib.import_module(module.name)
assert "megatron.core" in sys.modules
assert kinds == (torch.Tensor.cuda, torch.Tensor.type, torch.cuda.current_device, torch.cuda.synchronize)
print([name for name in own if getattr(torch, name) is not own[name]])
"""


def test_no_import_changes_torch() -> None:
    """All that drives Megatron-Core is imported, in a process that has not called `install`."""
    models = Path(__file__).parents[1] / "models"
    mixers = (".".join(path.relative_to(models.parent).with_suffix("").parts) for path in models.rglob("mixer.py"))
    parts = ("trainer", "step", "phases", "platform", "run.session", *mixers)
    line = [sys.executable, "-W", "ignore", "-c", IMPORTS, *(f"megatron_refine.{part}" for part in parts)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0 and done.stdout == "[]\n", done.stdout + done.stderr


LATE = """
import os
import megatron.core.jit as jit
compiled = jit.jit_fuser(lambda x: x * 2 + 1)
from megatron_refine.platform.megatron.install import install
install()
import torch
os.environ["PATH"] = ""  # there is no compiler
print(compiled(torch.ones(3)).tolist(), torch.zeros(1, device="cuda").device)
"""


@pytest.mark.slow
def test_megatron_imported_before_compiles_nothing_on_a_cpu() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", LATE], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0 and done.stdout == "[3.0, 3.0, 3.0] cpu\n", done.stdout + done.stderr


def fork_draws() -> Any:
    """On a rank: draws inside and outside Megatron's named random stream."""
    install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(3, force_reset_rng=True)
    torch.manual_seed(1)
    alone = torch.rand(4)
    torch.manual_seed(1)
    tracker = get_cuda_rng_tracker()
    first = torch.rand(2)
    with tracker.fork():
        inside = torch.rand(2)
    rest = torch.rand(2)
    saved = streams.rng_state()
    with tracker.fork():
        again = torch.rand(2)
    streams.set_rng_state(saved)
    with tracker.fork():
        return alone, torch.cat([first, rest]), inside, again, torch.rand(2)


def test_named_random_streams_do_not_touch_the_default_one(ranks: Any) -> None:
    alone, around, inside, again, replayed = ranks(1, fork_draws)[0]
    assert around.equal(alone)
    assert not inside.equal(again) and replayed.equal(again)


def test_what_is_compiled_is_kept_where_the_user_says_or_where_the_next_run_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    hardware.keep_compiled()
    assert os.environ["TRITON_CACHE_DIR"] == "/mine" and not (tmp_path / "megatron_refine/triton").exists()
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) == tmp_path / "megatron_refine/inductor"
    assert (tmp_path / "megatron_refine/inductor").is_dir()


def test_a_home_that_cannot_be_written_leaves_others_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    hardware.keep_compiled()
    assert "TRITON_CACHE_DIR" not in os.environ
