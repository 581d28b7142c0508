"""What the platform repairs in Megatron-Core."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_refine import platform


def fork_draws() -> Any:
    """On a rank: draws inside and outside Megatron's named random stream."""
    platform.install()
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
    saved = platform.rng_state()
    with tracker.fork():
        again = torch.rand(2)
    platform.set_rng_state(saved)
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
    platform.keep_compiled()
    assert os.environ["TRITON_CACHE_DIR"] == "/mine" and not (tmp_path / "megatron_refine/triton").exists()
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) == tmp_path / "megatron_refine/inductor"
    assert (tmp_path / "megatron_refine/inductor").is_dir()


def test_a_home_that_cannot_be_written_leaves_others_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    platform.keep_compiled()
    assert "TRITON_CACHE_DIR" not in os.environ
