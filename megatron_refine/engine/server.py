"""A server and what may be done with it.

    STARTING -> STALE -> HEALTHY        launched or found; answers; has the announced weights, checked
    HEALTHY -> STALE                    a sync began: its weights are in doubt until the sync ends
    any -> DEAD -> STARTING             does not answer; launched again

So no server goes from DEAD to HEALTHY without a sync, and only a HEALTHY one gets rollouts.
"""

import enum
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_refine.config import Config
from megatron_refine.engine.client import Client
from megatron_refine.engine.errors import ServerError
from megatron_refine.engine.launch import Process, launch, wait_until


class Condition(enum.Enum):
    STARTING = "starting"
    STALE = "stale"
    HEALTHY = "healthy"
    DEAD = "dead"


MOVES = {
    Condition.STARTING: {Condition.STALE, Condition.DEAD},
    Condition.STALE: {Condition.STALE, Condition.HEALTHY, Condition.DEAD},
    Condition.HEALTHY: {Condition.STALE, Condition.DEAD},
    Condition.DEAD: {Condition.STARTING, Condition.DEAD},
}


@dataclass
class Server:
    """A server, as the rank that manages it sees it."""

    client: Client
    tp: int
    log: Path
    condition: Condition = Condition.DEAD
    process: Process | None = None  # None: not ours
    starts: int = 0
    device: str = "cpu"  # where it keeps its weights
    gpu: int | None = None  # its first one on this machine, where we launch it there
    has_sessions: bool = True  # knows begin_weight_update and end_weight_update

    @property
    def url(self) -> str:
        return self.client.url

    def move(self, condition: Condition) -> None:
        assert condition in MOVES[self.condition], f"{self.url}: {self.condition.value} -> {condition.value}"
        self.condition = condition

    def start(self, config: Config, weights: Path) -> None:
        """Launch it with the weights of a folder, or look for it where it should run already."""
        self.stop()
        self.move(Condition.DEAD)
        self.move(Condition.STARTING)
        self.starts += 1
        if not config.engine.urls:
            port = int(self.url.rpartition(":")[2])
            self.process = launch(config, weights, port, self.log.with_suffix(f".{self.starts}.log"), self.gpu)

    def await_health(self, seconds: float) -> None:
        """STARTING -> STALE. Raises ServerError where it ends or does not answer in time.

        One that we launched has answered a request then: on a GPU the first one compiles kernels.
        """
        deadline = time.monotonic() + seconds
        # one that somebody else left paused does not generate, yet can be synced
        ready = self.client.healthy if self.process else self.client.answers
        if not wait_until(lambda: ready() or self.ended(), seconds):
            self.move(Condition.DEAD)
            raise ServerError(
                f"{self.url}: not healthy after {seconds:g} s" + (f"; {self._words()}" * bool(self.process))
            )
        if self.ended():
            self.move(Condition.DEAD)
            raise ServerError(f"{self.url}: ended while starting: {self._words()}")
        if self.process:
            self._warm_up(deadline - time.monotonic())
        info = self.client.get("/server_info")
        self.tp, self.device = int(info.get("tp_size", self.tp)), str(info.get("device", "cuda"))
        self.has_sessions = self.client.knows("/begin_weight_update")
        self.move(Condition.STALE)

    def _warm_up(self, seconds: float) -> None:
        """Raises ServerError."""
        try:
            self.client.generate(
                timeout=max(seconds, 1.0), input_ids=[[0, 0]], sampling_params={"max_new_tokens": 2, "ignore_eos": True}
            )
            self.client.post("/freeze_gc")  # on a CPU each flush collects garbage, among all modules: half a second
        except ServerError as error:
            self.move(Condition.DEAD)
            raise ServerError(f"{error} (the first request); {self._words()}") from None

    def ended(self) -> bool:
        return self.process is not None and self.process.ended()

    def answers(self, seconds: float) -> bool:
        return (
            not self.ended() and wait_until(lambda: self.ended() or self.client.answers(), seconds) and not self.ended()
        )

    def stop(self) -> None:
        if self.process:
            self.process.stop()
            self.process = None

    def _words(self) -> str:
        return self.process.last_words() if self.process else ""
