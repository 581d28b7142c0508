"""Ranks for tests: one warm process imports torch and Megatron once, then forks gloo ranks in a fraction of a second.

    pytest --pipe--> zygote --fork--> rank 0, rank 1, ...  (a temporary folder carries arguments, results and output)

The zygote is a process of its own, so nothing that a test does to torch or to Megatron's global state reaches pytest or
the next test. It is started with `python -c`: a checkpoint save starts spawned processes, and these would run a
`__main__` file again. Ranks see no GPU: CUDA does not survive a fork. Linux only.
"""

import contextlib
import ctypes
import faulthandler
import functools
import gc
import importlib
import multiprocessing
import os
import pickle
import pkgutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

from tests.rank_report import End, collect

ROOT = Path(__file__).parents[1]
# Deadlines are for hangs: a machine that does other work too may be ten times as slow as a quiet one.
DEADLINE = 400.0  # seconds of a job
GROUP_TIMEOUT = timedelta(seconds=300)
GRACE = 2.0  # seconds in which ranks may notice that another one failed
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # of prctl(2)


class Zygote:
    """pytest's end. Started by its first job, and again after a job that was interrupted."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.TemporaryFile()

    def __call__(self, world_size: int, fn: Callable[..., Any], timeout: float = DEADLINE, **kwargs: Any) -> list[Any]:
        """Run `fn(**kwargs)` of a test module on each rank of a gloo group; the results, by rank.

        Raises RankError with the first failing rank's traceback, or with the stacks of ranks that pass the deadline.
        """
        if self._process is None:
            self._start()
        name = f"{fn.__module__}:{fn.__qualname__}"
        with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
            Path(folder, "kwargs").write_bytes(pickle.dumps(kwargs))
            try:
                self._pipe.send((name, world_size, timeout, folder))
                ends = self._pipe.recv()
            except (EOFError, ConnectionError):
                self.close()
                raise RuntimeError(f"the zygote died:\n{self._read_log()}") from None
            except BaseException:  # an interrupted test: its answer must not be taken for the next one's
                self.close()
                raise
            return collect(Path(folder), name, timeout, ends)

    def close(self) -> None:
        """End the zygote; it kills what still runs."""
        if self._process is not None:
            self._pipe.close()
            self._process.wait()
            self._process = None

    def _start(self) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        code = f"from tests.zygote import serve; serve({theirs.fileno()})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C is for pytest, which then closes the pipe
        )
        theirs.close()

    def _read_log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")


def serve(pipe_fd: int) -> None:
    """The zygote: answer jobs until pytest closes the pipe."""
    sys.path[0] = str(ROOT)  # was '': a rank may change its directory
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # adopt what a dead rank leaves
    _import_once()
    pipe = Connection(pipe_fd)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            pipe.send(_run_job(pipe, *pipe.recv()))


def _import_once() -> None:
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    from megatron_refine.platform.megatron.install import install

    install()
    for name in ("models.gpt", "optimizer", "dist_checkpointing", "pipeline_parallel.schedules", "distributed"):
        importlib.import_module(f"megatron.core.{name}")
    late = ("torch._dynamo", "megatron_refine.run.session", "megatron_refine.report.html")  # what a run imports late
    from megatron_refine import models

    families = (each.name for each in pkgutil.walk_packages(models.__path__, f"{models.__name__}."))
    for name in (*late, *(name for name in families if not name.endswith(".serve"))):  # those need SGLang
        importlib.import_module(name)
    _fork_what_saves_spawn()
    gc.freeze()  # ranks neither look through what is here nor copy its pages


def _fork_what_saves_spawn() -> None:
    """The queue of a save's writers: a forked process holds it, as the writers are, not one that imports torch again.

    That took each rank that saves two seconds and more of both cores.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    @functools.cache
    def queue(*_: Any) -> Any:
        return multiprocessing.get_context("fork").Manager().Queue()

    for name in ("_get_write_results_queue", "get_write_results_queue"):  # up to Megatron-Core 0.16, and since
        if hasattr(filesystem_async, name):
            setattr(filesystem_async, name, queue)
    import pytest  # noqa: F401  every test module wants it


def _run_job(pipe: Connection, name: str, world_size: int, timeout: float, folder: str) -> list[End]:
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(pipe, name, r, world_size, folder)) for r in range(world_size)]
    for process in ranks:
        process.start()
    ends = _watch(pipe, ranks, timeout)
    _reap_adopted()
    return ends


def _reap_adopted() -> None:
    """Wait for what the ranks had started, killed with them; a process that left its rank's group is not waited for."""
    deadline = time.monotonic() + GRACE
    with contextlib.suppress(ChildProcessError):  # none left
        while time.monotonic() < deadline:
            if not os.waitpid(-1, os.WNOHANG)[0]:
                time.sleep(0.005)


def _watch(pipe: Connection, ranks: Sequence[BaseProcess], timeout: float) -> list[End]:
    """Wait for all ranks; stop the rest at the deadline, soon after a failure, or when pytest gives up."""
    running = {os.pidfd_open(process.pid or 0): rank for rank, process in enumerate(ranks)}
    ends: dict[int, End] = {}
    deadline, failed = time.monotonic() + timeout, False
    while running:
        ready = wait([pipe, *running], max(0.0, deadline - time.monotonic()))
        if not ready or pipe in ready:
            break
        for fd in [fd for fd in running if fd in ready]:
            rank = running.pop(fd)
            os.close(fd)
            ends[rank] = End("exited", _reap(ranks[rank]))
            if ends[rank].code and not failed:
                deadline, failed = min(deadline, time.monotonic() + GRACE), True
    _dump_stacks([ranks[rank] for rank in running.values()])
    for fd, rank in running.items():
        os.close(fd)
        _reap(ranks[rank])
        ends[rank] = End("stopped" if failed else "hung")
    return [ends[rank] for rank in range(len(ranks))]


def _dump_stacks(ranks: Sequence[BaseProcess]) -> None:
    for process in ranks:
        os.kill(process.pid or 0, signal.SIGUSR1)
    if ranks:
        time.sleep(0.2)


def _reap(process: BaseProcess) -> int | None:
    """Kill the rank's group, with all that it started, and only then free its process id."""
    assert process.pid is not None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # not yet a group of its own
        process.kill()
    process.join()
    return process.exitcode


def _rank(pipe: Connection, name: str, rank: int, world_size: int, folder: str) -> None:
    os.setsid()
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    pipe.close()
    _redirect_output(Path(folder, f"{rank}.log"))
    faulthandler.register(signal.SIGUSR1, Path(folder, f"{rank}.stack").open("w", encoding="utf-8"), all_threads=True)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    result = Path(folder, f"{rank}.result")
    try:
        _call_in_group(name, rank, world_size, result)
    except BaseException as error:
        cause = "".join(traceback.format_exception_only(error)).strip()
        _save(result, (False, (time.monotonic(), cause, traceback.format_exc())))
        _exit_now()


def _call_in_group(name: str, rank: int, world_size: int, result: Path) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = f"file://{result.parent}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=GROUP_TIMEOUT)
    module, _, function = name.partition(":")
    kwargs = pickle.loads((result.parent / "kwargs").read_bytes())
    _save(result, (True, getattr(importlib.import_module(module), function)(**kwargs)))
    if dist.is_initialized():
        dist.barrier()  # a peer may still be reading what this rank sent
        dist.destroy_process_group()


def _save(path: Path, outcome: tuple[bool, Any]) -> None:
    """Whole or not at all: the rank may be killed meanwhile."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(pickle.dumps(outcome))
    partial.rename(path)


def _redirect_output(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)


def _exit_now() -> NoReturn:
    """Without destructors, which may wait for the other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value)
