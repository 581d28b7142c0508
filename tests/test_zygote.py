"""The harness of all multi-rank tests: results, failures, hangs, and nothing left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.rank_report import RankError
from tests.zygote import Zygote


def gather(scale: int) -> tuple[int, torch.Tensor]:
    x = torch.full((2,), float(dist.get_rank() * scale), dtype=torch.bfloat16)
    dist.all_reduce(x)
    return int(os.environ["RANK"]), x


def raise_on(rank: int) -> None:
    print("before the failure")
    if dist.get_rank() == rank:
        raise ValueError("boom")
    dist.barrier()


def hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(1000)


def fail_while_another_computes() -> None:
    if dist.get_rank() == 0:
        raise ValueError("boom")
    time.sleep(1000)


def kill_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def leave_without_result() -> None:
    os._exit(0)


def leave_a_child() -> int:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"]).pid


def initialize_megatron() -> int:
    from megatron.core import parallel_state

    assert not parallel_state.model_parallel_is_initialized()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    return parallel_state.get_tensor_model_parallel_rank()


def save_and_load(folder: str) -> tuple[torch.Tensor, int]:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    rank, world = dist.get_rank(), dist.get_world_size()

    def sharded(x: torch.Tensor) -> dict[str, ShardedTensor]:
        return {"w": ShardedTensor.from_rank_offsets("w", x, (0, rank, world))}

    dist_checkpointing.save(sharded(torch.arange(3.0) + 10 * rank), folder)
    loaded = dist_checkpointing.load(sharded(torch.zeros(3)), folder)
    return loaded["w"], os.getpid()


def test_results_come_by_rank(ranks: Zygote) -> None:
    results = ranks(3, gather, scale=2)
    assert [rank for rank, _ in results] == [0, 1, 2]
    assert all(torch.equal(x, torch.tensor([6.0, 6.0], dtype=torch.bfloat16)) for _, x in results)


def test_one_rank_is_a_group_too(ranks: Zygote) -> None:
    assert ranks(1, initialize_megatron) == [0]
    assert ranks(2, initialize_megatron) == [0, 1]  # in new processes: nothing leaked


def test_failure_names_the_first_rank_and_shows_its_traceback(ranks: Zygote) -> None:
    with pytest.raises(RankError) as caught:
        ranks(2, raise_on, rank=1)
    message = str(caught.value)
    assert "rank 1 of 2 failed first: ValueError: boom" in message
    assert 'raise ValueError("boom")' in message and "test_zygote.py" in message
    assert "--- rank 0: " in message and "before the failure" in message


def test_failure_does_not_wait_for_ranks_that_compute(ranks: Zygote) -> None:
    with pytest.raises(RankError, match=r"rank 0 of 2 failed first: ValueError: boom") as caught:
        ranks(2, fail_while_another_computes, timeout=100)
    assert "rank 1: stopped" in str(caught.value)


@pytest.mark.slow
def test_hang_names_the_ranks_and_shows_their_stacks(ranks: Zygote) -> None:
    with pytest.raises(RankError) as caught:
        ranks(2, hang_on, timeout=4, rank=1)
    message = str(caught.value)
    assert "deadline of 4 s passed, still running: rank 1 of 2" in message
    assert "in hang_on" in message
    assert "rank 0: still running, its function done" in message


def test_killed_rank_is_reported(ranks: Zygote) -> None:
    with pytest.raises(RankError, match=r"rank 0 of 2 failed first: killed by SIGKILL"):
        ranks(2, kill_on, rank=0)


def test_rank_without_result_is_a_failure(ranks: Zygote) -> None:
    with pytest.raises(RankError, match=r"rank 0 of 1 failed first: left with exit status 0 and no result"):
        ranks(1, leave_without_result)


def test_children_of_a_rank_end_with_it(ranks: Zygote) -> None:
    assert not any(psutil.pid_exists(pid) for pid in ranks(2, leave_a_child))


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell starts background jobs with SIGINT ignored, and Python then leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupted_job_is_killed_and_the_next_one_starts_anew(ranks: Zygote) -> None:
    ranks(1, initialize_megatron)
    assert ranks._process is not None
    family = [psutil.Process(ranks._process.pid)]
    main_thread = threading.main_thread().ident or 0

    def interrupt() -> None:
        family.extend(family[0].children())
        signal.pthread_kill(main_thread, signal.SIGINT)

    threading.Timer(1, interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        ranks(1, hang_on, rank=0)
    assert len(family) == 2 and not any(process.is_running() for process in family)
    assert ranks(1, initialize_megatron) == [0]


def test_ranks_start_faster_than_torch_is_imported(ranks: Zygote) -> None:
    ranks(1, initialize_megatron)
    start = time.perf_counter()
    ranks(2, gather, scale=1)
    warm = time.perf_counter() - start
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    assert warm < time.perf_counter() - start


def test_checkpoint_is_saved_and_loaded_by_forked_ranks(ranks: Zygote, tmp_path: Path) -> None:
    first, second = ranks(2, save_and_load, folder=str(tmp_path))
    assert first[0].tolist() == [0, 1, 2] and second[0].tolist() == [10, 11, 12]
    assert not psutil.pid_exists(first[1]) and not psutil.pid_exists(second[1])
