"""What the platform repairs in Megatron-Core."""

from typing import Any

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
