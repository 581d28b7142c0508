"""Rollouts from SGLang servers that hold a copy of the weights.

Rank 0 manages the servers; the first rank of every replica asks them for rollouts; the source rank of every pipeline
stage sends them its weights. Every rank makes the same calls: what fails on one fails on all, and all recover together.
A recovery loads the weights from disk into every server that answers and starts the others anew.
"""

import hashlib
import secrets
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import nn

from megatron_refine.config import Config
from megatron_refine.convert.mapping import Converter
from megatron_refine.engine import guard, weight_sync
from megatron_refine.engine.client import Client
from megatron_refine.engine.collect import Begun
from megatron_refine.engine.control import Control
from megatron_refine.engine.errors import EngineError, ServerError
from megatron_refine.engine.fleet import Fleet, client
from megatron_refine.engine.launch import positions
from megatron_refine.engine.server import Server
from megatron_refine.models import family
from megatron_refine.models.cost import request_bytes
from megatron_refine.platform import hardware
from megatron_refine.records import RolloutRequest, Rollouts
from megatron_refine.trainer.export import (
    empty_folder,
    is_source,
    stage_tensors,
    to_the_end,
    write_rest,
    write_stage,
)
from megatron_refine.trainer.parallel import Ranks, over_replica

BUCKET_MB = {"nccl": 512, "gloo": 256}
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class SGLangEngine:
    """Nothing is started before the first `sync`."""

    def __init__(self, config: Config, model: nn.Module, ranks: Ranks, say: Callable[[str], None]):
        """say: shows a line to the user, on the main rank."""
        self.config, self.model, self.ranks, self.say = config, model, ranks, say
        engine, run = config.engine, Path(config.run.dir)
        longest = 2 * config.refine.num_chunks * engine.request_timeout  # requests of a sequence, one after the other
        self.control = Control(engine.start_timeout + 2 * engine.sync_timeout + longest)
        self.converter = Converter(config.model)
        self.fleet = Fleet(config, (run / "logs" / "engine").absolute()) if ranks.is_main else None
        self.token = self.control.gather(secrets.token_hex(4))[0]  # no other run's weights have such a label
        own = _own_folder(engine.sync_dir, run, self.token) if engine.sync_dir else run / "engine"
        self.folder = own.absolute()
        self.version: int | None = None  # None: the weights of the servers are in doubt
        self.begun: Begun | None = None  # rollouts that are still to be finished
        self.servers: list[Server] = []  # as the ranks see them that talk to them
        self.groups: list[weight_sync.UpdateGroup] = []  # of this rank: one on a stage's source, else none
        self.joined = False
        self.recoveries = self.group_count = self.prompt_tokens = self.cached_tokens = 0
        self.guard_seconds = self.transfer_seconds = 0.0

    def label(self, version: int) -> str:
        """What the servers announce their weights as."""
        return f"{self.token}-{version}"

    @property
    def bucket_bytes(self) -> int:
        """Return the size of a broadcast's bucket, in bytes."""
        return (self.config.engine.bucket_mb or BUCKET_MB[hardware.backend()]) << 20

    def sync(self, weight_version: int) -> None:
        """All servers have the trainer's weights, checked, and announce them. Raises EngineError."""
        if weight_version == self.version:
            return
        self._await_requests()
        started, self.version = self.version is not None, None
        try:
            if started:
                self._update(weight_version)
            else:
                self._start(weight_version)
            self._check(weight_version)
        except ServerError as error:
            self._recover(weight_version, str(error))
        self.version = weight_version

    def rollout(self, request: RolloutRequest) -> Rollouts:
        """Raises EngineError. `request.fork` is not used: servers prefill the prefixes themselves."""
        begun = self.begin(request)
        return self.finish(begun, begun.version)

    def begin(self, request: RolloutRequest) -> Begun:
        """Ask the servers; this rank's requests, if it has any, are made by a thread."""
        assert self.version is not None, "sync before the first rollout"
        self.begun = begun = Begun(request, self.version)
        self._ask(begun)
        return begun

    def _ask(self, begun: Begun) -> None:
        """Ask for what is missing; for all of it where the servers have other weights than before."""
        if self.ranks.leads_replica:
            begun.ask(self._clients(), self.label(begun.version), self.config.engine.max_requests)

    @torch.no_grad()
    def finish(self, begun: Begun, weight_version: int) -> Rollouts:
        """Raises EngineError. Where servers failed, they are brought to `weight_version`, and finish with that."""
        request, seconds = begun.request, self.config.engine.sync_timeout
        while True:
            try:
                self.control.attempt(begun.result)
                if self.config.engine.offload:  # what servers took beside their pools goes back before the state does
                    self._on_main(lambda fleet: fleet.each(lambda server: weight_sync.flush(server, seconds)))
                break
            except ServerError as error:
                self._recover(weight_version, str(error))
                begun.version = weight_version
                self._ask(begun)
        self.begun = None
        shape = (*request.positions.shape, request.num_rollouts, request.rollout_len)
        tokens, logprobs = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
        if begun.collector:
            tokens, logprobs = begun.collector.tensors()
            self.prompt_tokens += begun.collector.prompt_tokens
            self.cached_tokens += begun.collector.cached_tokens
        tokens, logprobs = (over_replica(x.to(request.tokens.device), self.ranks) for x in (tokens, logprobs))
        return Rollouts(tokens, logprobs, begun.version)

    def metrics(self) -> dict[str, float]:
        """Since the last call: seconds of broadcasts (begin to end) and of checks after syncs; tokens of this rank's
        prompts, and how many of them the servers found in their caches and computed. Since the start: recoveries and
        restarts."""
        found = {
            "engine/recoveries": self.recoveries,
            "engine/restarts": self.fleet.restarts if self.fleet else 0,
            "engine/transfer_seconds": self.transfer_seconds,
            "engine/guard_seconds": self.guard_seconds,
        }
        if self.prompt_tokens:
            found |= {
                "engine/prompt_tokens": self.prompt_tokens,
                "engine/cached_tokens": self.cached_tokens,
                "engine/computed_tokens": self.prompt_tokens - self.cached_tokens,
            }
        self.guard_seconds = self.transfer_seconds = 0.0
        self.prompt_tokens = self.cached_tokens = 0
        return found

    def close(self) -> None:
        """End the servers that were launched, and leave nothing in engine.sync_dir."""
        if self.fleet:
            self.fleet.stop()
            if self.config.engine.sync_dir:
                shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, version: int) -> None:
        engine = self.config.engine
        if engine.sync_dir:  # of attempts that were killed
            self._on_main(lambda fleet: _clear_others(self.folder))
        self.say("sglang: " + (f"looking for {', '.join(engine.urls)}" if engine.urls else "starting the servers"))
        folder, start = self._export(version), time.perf_counter()
        self._on_main(lambda fleet: fleet.start(folder))
        seconds, size = time.perf_counter() - start, request_bytes(self.config.model, engine.tp) / 2**20
        states = f"the states of a request take {size:.2f} MiB"
        self.say(f"sglang: {len(self._share())} healthy after {seconds:.0f} s; {states}")

    def _update(self, version: int) -> None:
        """New weights into paused servers, whose state is STALE from here on."""
        seconds, disk = self.config.engine.sync_timeout, self.config.engine.sync == "disk"
        self._on_main(lambda fleet: fleet.stale())
        self._on_main(lambda fleet: fleet.each(lambda server: weight_sync.pause(server, seconds)))
        if disk:
            folder = self._export(version)
            self._on_main(lambda fleet: fleet.each(lambda server: weight_sync.load_folder(server, folder, seconds)))
            return
        start = time.perf_counter()
        self._on_main(lambda fleet: fleet.each(lambda server: weight_sync.begin(server, seconds)))
        self._broadcast()
        self._on_main(lambda fleet: fleet.each(lambda server: weight_sync.end(server, seconds)))
        self.transfer_seconds += time.perf_counter() - start

    def _broadcast(self) -> None:
        """Stage after stage, from its source rank to all servers."""
        if not self.joined:
            self.group_count += 1
            for stage in range(self.ranks.pp):  # one after the other: in the same order on all servers
                self.control.attempt(lambda stage=stage: self._join(stage))  # type: ignore[misc]
            self.joined = True
        for stage in range(self.ranks.pp):
            self.control.attempt(lambda stage=stage: self._send(stage))  # type: ignore[misc]

    def _join(self, stage: int) -> None:
        if is_source(self.ranks) and self.ranks.pp_rank == stage:
            name = f"megatron_refine_{self.token}_{self.group_count}_{stage}"
            address = self.config.engine.master_address or _address([server.url for server in self.servers])
            seconds = self.config.engine.sync_timeout
            self.groups = [weight_sync.UpdateGroup(name, self.servers, address, seconds)]

    def _send(self, stage: int) -> None:
        if self.ranks.pp_rank != stage:
            return
        with to_the_end(stage_tensors(self.model, self.converter, self.ranks)) as tensors:
            if is_source(self.ranks):
                weight_sync.push(self.groups[0], tensors, self.bucket_bytes)

    def _check(self, version: int) -> None:
        """Checksums, announcement, probe; the servers are HEALTHY afterwards. Raises ServerError on all ranks alike."""
        start, seconds, label = time.perf_counter(), self.config.engine.sync_timeout, self.label(version)
        kinds = {(server.tp, server.device) for server in self._share()}
        found = self._on_main(lambda fleet: fleet.each(lambda server: guard.server_checksums(server, seconds)))
        parts = self.control.attempt(lambda: self._expected(kinds))
        expected = {kind: {k: v for part in parts for k, v in part[kind].items()} for kind in kinds}

        def announce(fleet: Fleet) -> list[list[guard.Probed]]:
            for server, sums in zip(fleet.servers, found, strict=True):
                guard.compare_checksums(server.url, sums, expected[server.tp, server.device])
            fleet.each(lambda server: weight_sync.resume(server, label, seconds))
            return fleet.each(lambda server: guard.ask_probe(server, self.config, label))

        guard.check_probes(self.model, self.config, self._on_main(announce))
        self._on_main(lambda fleet: fleet.healthy())
        self.guard_seconds += time.perf_counter() - start

    def _expected(self, kinds: set[tuple[int, str]]) -> dict[Any, guard.Sums]:
        serving = family.of(self.config.model.family).serving
        assert serving, "the configuration refuses other families"
        with to_the_end(stage_tensors(self.model, self.converter, self.ranks)) as tensors:
            return guard.expected_checksums(serving, self.config.model, tensors, kinds)

    def _recover(self, version: int, error: str) -> None:
        """Bring all servers to `version` through the disk, again and again within the budget. Raises EngineError."""
        self.version = None
        self._await_requests()
        while True:
            self.recoveries += 1
            if self.recoveries > self.config.engine.max_restarts:
                raise EngineError(
                    f"sglang: {error}; given up after {self.recoveries - 1} recoveries (engine.max_restarts); the logs "
                    f"of the servers are in {self.config.run.dir}/logs/engine; run the same command again"
                )
            self.say(f"sglang: {error}; loading the weights from disk ({self.recoveries})")
            try:
                for group in self.groups:
                    group.close()
                self.groups, self.joined = [], False
                folder = self._export(version)
                self._on_main(lambda fleet, folder=folder: fleet.revive(folder))  # type: ignore[misc]
                self._check(version)
                break
            except ServerError as again:
                error = str(again)
        self.version = version

    def _export(self, version: int) -> Path:
        """The weights as a folder; the one before it is removed."""
        folder = self.folder / "weights"
        self._on_main(lambda fleet: empty_folder(folder))
        parts = self.control.attempt(lambda: write_stage(self.model, self.converter, self.ranks, folder))
        files = {name: file for part in parts for name, file in part.items()}
        dtype = next(self.model.parameters()).dtype
        self._on_main(lambda fleet: write_rest(folder, self.config.model, dtype, files, positions(self.config)))
        return folder

    def _on_main(self, work: Callable[[Fleet], Any]) -> Any:
        """Rank 0 does it; its result on all ranks. Raises ServerError on all."""
        return self.control.attempt(lambda: work(self.fleet) if self.fleet else None)[0]

    def _await_requests(self) -> None:
        """No rollouts are under way on any rank when it returns: an update would go through the middle of them."""
        if self.begun:
            self.control.attempt(self.begun.wait)

    def _share(self) -> list[Server]:
        """Tell every rank where the servers are."""
        mine = [(s.url, s.tp, s.device) for s in self.fleet.servers] if self.fleet else None
        known = {server.url: server for server in self.servers}
        if self.fleet:
            known = {server.url: server for server in self.fleet.servers}
        self.servers = [
            known.get(url) or Server(client(self.config, url), tp, Path(), device=device)
            for url, tp, device in self.control.gather(mine)[0]
        ]
        return self.servers

    def _clients(self) -> list[Client]:
        return [server.client for server in self.servers]


def _own_folder(sync_dir: str, run: Path, token: str) -> Path:
    """Return this attempt's folder in engine.sync_dir: other runs, and the user, have theirs beside it."""
    return Path(sync_dir) / f"megatron_refine-{hashlib.sha256(str(run.absolute()).encode()).hexdigest()[:12]}-{token}"


def _clear_others(folder: Path) -> None:
    """Remove what earlier attempts at the run have left beside `folder`."""
    for path in folder.parent.glob(f"{folder.name.rpartition('-')[0]}-*"):
        shutil.rmtree(path, ignore_errors=True)


def _address(urls: list[str]) -> str:
    """This machine as servers at `urls` reach it."""
    local = all(urlparse(url).hostname in LOOPBACK for url in urls)
    return "127.0.0.1" if local else socket.gethostname()
