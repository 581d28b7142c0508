"""Ranks and the meeting point from the environment; what the platform repairs in Megatron-Core."""

from typing import Any

import pytest
import torch

from megatron_refine import platform

SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "2"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, (0, 1, 0)), (TORCHRUN, (3, 4, 2)), (SLURM, (5, 16, 1)), (SLURM | TORCHRUN, (3, 4, 2))],
    ids=["alone", "torchrun", "slurm", "torchrun under slurm"],
)
def test_ranks_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: tuple[int, int, int]
) -> None:
    for name in (*SLURM, *TORCHRUN):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (platform.global_rank(), platform.world_size(), platform.local_rank()) == expected


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[03-07,9],login1", "gpu03"), ("node1", "node1"), ("a1,b[2-3]", "a1"), ("n[12,14]", "n12"), ("", "")],
)
def test_the_first_host_of_a_slurm_node_list(nodes: str, first: str) -> None:
    assert platform._first_host(nodes) == first


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
