"""How the ranks of a job meet, and how processes that are no ranks meet them."""

import os
import threading
import time
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

from megatron_refine import launcher
from megatron_refine.errors import LostError
from megatron_refine.platform.hardware import CPU, backend, device, has_gpu

_said = 0  # times that rank 0 spoke


def global_rank() -> int:
    return launcher.read().rank


def local_rank() -> int:
    return launcher.read().local


def world_size() -> int:
    return launcher.read().world


def init_process_group(timeout_minutes: float) -> None:
    """Join the default group, of the ranks that the launcher has started. Raises LaunchError, and LostError where they
    do not meet in time."""
    place = launcher.read()
    address, port = launcher.meeting(place)
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    timeout = timedelta(minutes=timeout_minutes)
    if not has_gpu():
        torch.set_num_threads(place.threads)
    own_device = device() if device() != CPU else None
    try:
        store = _meet(place, timeout) if place.world > 1 else None  # one alone waits for nobody
        dist.init_process_group(
            backend(), store=store, rank=place.rank, world_size=place.world, timeout=timeout, device_id=own_device
        )
    except (dist.DistNetworkError, dist.DistStoreError, TimeoutError) as error:
        cause = " ".join(str(error).split())[:160].removesuffix(".") or f"no answer in {timeout_minutes:.3g} minutes"
        raise LostError(
            f"rank {place.rank}: the {place.world} ranks did not meet at MASTER_ADDR={address}, MASTER_PORT={port}: "
            f"{cause}; start all of them, with an address that they all reach and a free port"
        ) from None


def _meet(place: launcher.Launch, timeout: timedelta) -> dist.Store:
    """Return the store in which the ranks find each other. Raises what torch raises, and TimeoutError.

    A thread of its own asks for it: torch waits for the first answer without a deadline, and where another program
    listens at the port there is none.
    """
    met: Future[dist.Store] = Future()

    def ask() -> None:
        try:
            met.set_result(next(dist.rendezvous("env://", place.rank, place.world, timeout=timeout))[0])
        except Exception as error:
            met.set_exception(error)

    threading.Thread(target=ask, daemon=True, name="meeting").start()
    store = met.result(timeout.total_seconds())
    store.set_timeout(timeout)
    return store


def from_first(value: str | None) -> str:
    """Return what rank 0 says; the others give None. They wait however long it takes, beyond any deadline of a group.

    Raises RuntimeError where rank 0 is gone.
    """
    global _said
    from torch.distributed import distributed_c10d as c10d

    _said += 1
    store, key = c10d._get_default_store(), f"from_first/{_said}"
    if value is not None:
        store.set(key, value)
        return value
    while not store.check([key]):
        time.sleep(0.1)
    return bytes(store.get(key)).decode()


class GroupStore:
    """The meeting point of a process group with processes that are no ranks of ours."""

    def __init__(self, address: str, seconds: float, port: int = 0):
        """address: the machine of rank 0 as the others reach it; port: 0 on rank 0, which chooses one; seconds:
        deadline of every operation."""
        self.timeout = timedelta(seconds=seconds)
        self._store = dist.TCPStore(address, port, is_master=not port, timeout=self.timeout, wait_for_workers=False)
        self.port = self._store.port

    def join(self, name: str, world: int, rank: int = 0) -> Any:
        """Waits for the other `world` - 1. Raises RuntimeError in time where they do not come.

        torch offers no public way to make a group outside of the default one; its own new_group uses this helper, and
        so does the other side.
        """
        from torch.distributed import distributed_c10d as c10d

        store = dist.PrefixStore(name, self._store)
        group, _ = c10d._new_process_group_helper(
            world, rank, [], c10d.Backend(backend()), store, group_name=cast(Any, name), timeout=self.timeout
        )
        c10d._world.pg_group_ranks[group] = {i: i for i in range(world)}
        return group
