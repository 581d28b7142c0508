"""All servers of a run, on the rank that manages them."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from megatron_refine import launcher
from megatron_refine.config import Config
from megatron_refine.engine.client import Client
from megatron_refine.engine.errors import ServerError
from megatron_refine.engine.launch import first_gpus
from megatron_refine.engine.server import Condition, Server
from megatron_refine.engine.weight_sync import load_folder, pause
from megatron_refine.platform import hardware

T = TypeVar("T")
ANSWER_SECONDS = 10.0  # until a server that does not answer is dead


def client(config: Config, url: str) -> Client:
    """Return a client with the run's deadline and API key."""
    key = config.engine.api_key_env
    return Client(url, config.engine.request_timeout, os.environ[key] if key else "")


class Fleet:
    """Launched by us, or found at engine.urls. Raises ConfigError where the GPUs of this machine are too few."""

    def __init__(self, config: Config, logs: Path):
        self.config, engine = config, config.engine
        urls = engine.urls
        self._held = [] if urls or engine.port else [launcher.reserve_port(engine.host) for _ in range(engine.servers)]
        if not urls:
            ports = [held.getsockname()[1] for held in self._held]
            ports = ports or [engine.port + i for i in range(engine.servers)]
            urls = [f"http://{engine.host}:{port}" for port in ports]
        gpus = first_gpus(config, hardware.gpus(), launcher.read().here)
        self.servers = [
            Server(client(config, url), engine.tp, logs / f"sglang_{i}", gpu=None if engine.urls else gpus[i])
            for i, url in enumerate(urls)
        ]

    @property
    def restarts(self) -> int:
        return sum(max(0, server.starts - 1) for server in self.servers)

    def each(self, work: Callable[[Server], T]) -> list[T]:
        """`work` on all servers at once. Raises ServerError where it failed on one, after it has ended on all."""
        with ThreadPoolExecutor(len(self.servers)) as pool:
            running = [pool.submit(work, server) for server in self.servers]
        return [future.result() for future in running]

    def start(self, folder: Path) -> None:
        """Bring up servers with the weights of a folder. STALE afterwards. Raises ServerError."""
        for server in self.servers:  # a process is tied to the thread that starts it: no pool here
            server.start(self.config, folder)
        self.each(lambda server: self._arrive(server, folder))

    def revive(self, folder: Path) -> None:
        """Load a folder's weights into every server that answers, start the others anew. STALE afterwards.

        Raises ServerError.
        """
        dead = [server for server in self.servers if not self._reload(server, folder)]
        for server in dead:
            server.start(self.config, folder)
        for server in dead:
            self._arrive(server, folder)

    def healthy(self) -> None:
        """The weights of all are checked."""
        for server in self.servers:
            server.move(Condition.HEALTHY)

    def stale(self) -> None:
        for server in self.servers:
            server.move(Condition.STALE)

    def stop(self) -> None:
        for server in self.servers:
            server.stop()
            server.client.close()
        for held in self._held:
            held.close()

    def _reload(self, server: Server, folder: Path) -> bool:
        """Whether the server is there and took the weights; else it is DEAD."""
        seconds = self.config.engine.sync_timeout
        try:
            if server.condition is Condition.DEAD or not server.answers(ANSWER_SECONDS):
                raise ServerError(f"{server.url}: does not answer")
            server.move(Condition.STALE)
            pause(server, ANSWER_SECONDS)
            load_folder(server, folder, seconds)
        except ServerError:
            server.move(Condition.DEAD)
            return False
        return True

    def _arrive(self, server: Server, folder: Path) -> None:
        server.await_health(self.config.engine.start_timeout)
        if self.config.engine.urls:  # it came up with weights of its own
            pause(server, ANSWER_SECONDS)
            load_folder(server, folder, self.config.engine.sync_timeout)
