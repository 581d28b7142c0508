"""How new weights reach the servers: by broadcast, or through a folder.

    pause (retract), flush -> begin, buckets, end   or   load from disk -> version, flush, continue

A recurrent state is a product of the weights that made it. A request that went on across an update, or a prefix cache
that outlived it, would answer with log-probabilities a nat off; hence retract (never in_place) and the two flushes.
"""

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_refine.engine.errors import ServerError
from megatron_refine.engine.server import Server
from megatron_refine.platform import hardware, rendezvous

LEAVE_SECONDS = 5.0
FIRST_PART = 8  # nothing travels while the first bucket is filled: it is so much smaller, the next ones grow twofold
Tensors = Iterator[tuple[str, Tensor]]


def pause(server: Server, seconds: float) -> None:
    """No request is running when it returns, and no state of one is left. Raises ServerError."""
    server.client.post("/pause_generation", seconds, mode="retract")
    flush(server, seconds)


def flush(server: Server, seconds: float) -> None:
    """Have an idle server forget its requests' states, and return the memory beside its pools. Raises ServerError."""
    server.client.post("/flush_cache", seconds)


def begin(server: Server, seconds: float) -> None:
    """Open an update, where the server's version knows such; one that was left open is closed first."""
    if not server.has_sessions:
        return
    try:
        server.client.post("/begin_weight_update", seconds)
    except ServerError:
        server.client.post("/end_weight_update", seconds)
        server.client.post("/begin_weight_update", seconds)


def end(server: Server, seconds: float) -> None:
    if server.has_sessions:
        server.client.post("/end_weight_update", seconds)


def load_folder(server: Server, folder: Path, seconds: float) -> None:
    """Replace the weights of a paused server by those of a folder, however it began. Raises ServerError."""
    body = {"model_path": str(folder), "load_format": "auto", "flush_cache": True}
    server.client.post("/update_weights_from_disk", seconds, **body)


def resume(server: Server, label: str, seconds: float) -> None:
    """Announce the weights and let requests in. Raises ServerError."""
    server.client.post("/update_weight_version", seconds, new_version=label, abort_all_requests=False)
    flush(server, seconds)
    server.client.post("/continue_generation", seconds)


class UpdateGroup:
    """A process group of one of our ranks and all ranks of all servers."""

    def __init__(self, name: str, servers: list[Server], address: str, seconds: float):
        """Raises ServerError where a server does not join in time; the others then leave by closing."""
        self.name, self.servers, self.seconds, self.group = name, servers, seconds, None
        self._pool = ThreadPoolExecutor(2 * len(servers))
        self._asked: list[Future[Any]] = []  # of the last bucket: servers may still be loading it
        self.memory = SendMemory()
        store, offset = rendezvous.GroupStore(address, seconds), 1
        world = 1 + sum(server.tp for server in servers)
        joining = []
        for server in servers:
            body = {
                "master_address": address, "master_port": store.port, "rank_offset": offset, "world_size": world,
                "group_name": name, "backend": hardware.backend(),
            }  # fmt: skip
            joining.append(self._pool.submit(server.client.post, "/init_weights_update_group", seconds, **body))
            offset += server.tp
        try:
            self.group = store.join(name, world)
        except Exception as error:
            raise ServerError(next(_failures(joining), f"update group {name}: {error}")) from None
        raise_first(joining)

    def broadcast(self, names: list[str], tensors: list[Tensor], buffer: Tensor) -> None:
        """Send one bucket: `buffer` holds the bytes of the tensors, end to end. Raises ServerError.

        Returns when the servers have the bytes. What they make of them is known with the next bucket or at `finish`.
        They take buckets in the order of these calls: the request of one follows when the bytes of the one before it
        are with the servers.
        """
        if self.group is None:
            raise ServerError(f"update group {self.name}: is closed")
        body: dict[str, Any] = {
            "names": names,
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors],
            "shapes": [list(tensor.shape) for tensor in tensors],
            "group_name": self.name, "load_format": "flattened_bucket", "flush_cache": False,
        }  # fmt: skip
        path = "/update_weights_from_distributed"
        asked = [self._pool.submit(server.client.post, path, self.seconds, **body) for server in self.servers]
        try:
            dist.broadcast(buffer, group_src=0, group=self.group)
        except Exception as error:
            self.close()  # servers that wait for the bytes stop waiting
            raise ServerError(next(_failures([*self._asked, *asked]), f"broadcast: {error}")) from None
        hardware.synchronize()
        self.finish()
        self._asked = asked

    def finish(self) -> None:
        """Wait until the servers have loaded what was sent. Raises ServerError."""
        asked, self._asked = self._asked, []
        raise_first(asked)

    def close(self) -> None:
        """Leave, which ends the wait of a server for our bytes; then tell the servers to."""
        if self.group is not None:
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group(self.group)
            self.group = None
        for server in self.servers:
            with contextlib.suppress(ServerError):
                server.client.post("/destroy_weights_update_group", LEAVE_SECONDS, group_name=self.name)
        self._pool.shutdown(wait=False)


class SendMemory:
    """Memory of two buckets: one travels while the other is filled. The kernel clears it once, as it is kept."""

    def __init__(self) -> None:
        self._halves, self._turn = [torch.empty(0, dtype=torch.uint8)] * 2, 0

    def join(self, tensors: list[Tensor]) -> Tensor:
        """The bytes of tensors, end to end. They last until the second next call."""
        self._turn, size = 1 - self._turn, sum(tensor.nbytes for tensor in tensors)
        half = self._halves[self._turn]
        if half.numel() < size or half.device != tensors[0].device:
            half = self._halves[self._turn] = torch.empty(size, dtype=torch.uint8, device=tensors[0].device)
        return torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors], out=half[:size])


def buckets(tensors: Tensors, size: int, memory: SendMemory) -> Iterator[tuple[list[str], list[Tensor], Tensor]]:
    """Tensors of at most `size` bytes, or one, together: their names, themselves, and their bytes end to end."""
    names: list[str] = []
    held: list[Tensor] = []
    limit = size // FIRST_PART
    for name, tensor in tensors:
        used = sum(t.nbytes for t in held)
        aligned = used % tensor.itemsize == 0  # a server reads at multiples of the width
        if held and (used + tensor.nbytes > limit or not aligned):
            yield names, held, memory.join(held)
            names, held, limit = [], [], min(2 * limit, size)
        names.append(name)
        held.append(tensor)
    if held:
        yield names, held, memory.join(held)


def push(group: UpdateGroup, tensors: Tensors, size: int) -> None:
    """Send tensors in buckets of `size` bytes; while one travels, the next is made. Raises ServerError."""
    with ThreadPoolExecutor(1) as sender:
        sending: Future[None] | None = None
        for bucket in buckets(tensors, size, group.memory):
            if sending:
                sending.result()
            sending = sender.submit(group.broadcast, *bucket)
        if sending:
            sending.result()
        group.finish()


def raise_first(futures: list[Future[Any]]) -> None:
    """Wait for all. Raises what the first failed one raised."""
    for message in _failures(futures):
        raise ServerError(message)


def _failures(futures: list[Future[Any]]) -> Iterator[str]:
    errors = [future.exception() for future in futures]
    yield from (str(error) for error in errors if error)
