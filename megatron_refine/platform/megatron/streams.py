"""Megatron's named random streams: on a CPU, and what they stand at."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from megatron_refine.platform.hardware import has_gpu


def on_cpu() -> None:
    """Put the same named random streams over the CPU's generator."""
    import megatron.core.tensor_parallel.random as random

    class CpuRNGStatesTracker(random.CudaRNGStatesTracker):
        _current_state_name: str

        @contextlib.contextmanager
        def fork(self, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            if name not in self.states_:
                raise ValueError(f"rng state {name} is not added")
            outer, outer_name = torch.get_rng_state(), self._current_state_name
            if outer_name in self.states_:
                self.states_[outer_name] = outer
            torch.set_rng_state(self.states_[name])
            self._current_state_name = name
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(self.states_.get(outer_name, outer))
                self._current_state_name = outer_name

    random.CudaRNGStatesTracker = CpuRNGStatesTracker
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def rng_state() -> dict[str, Any]:
    """State of every generator that Megatron draws from."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    state = {"cpu": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if has_gpu() else {})


def set_rng_state(state: dict[str, Any]) -> None:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    torch.set_rng_state(state["cpu"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    if has_gpu() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
