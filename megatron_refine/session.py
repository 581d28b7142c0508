"""A training run, set up: everything that train.py's loop uses, on every rank."""

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch.distributed as dist
from torch import nn

from megatron_refine import platform
from megatron_refine.config import Config, ConfigError
from megatron_refine.data.order import rank_samples, sample_rows
from megatron_refine.data.prepare import prepare
from megatron_refine.data.tokenizer import decode
from megatron_refine.engine.native import NativeEngine
from megatron_refine.estimate.flops import step_flops
from megatron_refine.eval.heldout import HeldOut
from megatron_refine.records import Batch, RolloutEngine
from megatron_refine.report.folder import RunFolder
from megatron_refine.step.refine import RefineStep
from megatron_refine.trainer.checkpoint import Checkpoints, Progress
from megatron_refine.trainer.model import build_model
from megatron_refine.trainer.optimizer import Updater
from megatron_refine.trainer.parallel import Ranks, init_parallel
from megatron_refine.trainer.signals import StopRequest


def _check_writable(folder: Path) -> None:
    """Raises ConfigError where the run folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"run.dir={folder}: cannot be written: {error.strerror}; name another folder") from None


def _engine(config: Config, model: nn.Module, ranks: Ranks, say: Callable[[str], None]) -> RolloutEngine:
    if config.engine.kind == "native" or not config.refine.enabled:
        return NativeEngine(model)
    from megatron_refine.engine.sglang import SGLangEngine

    return SGLangEngine(config, model, ranks, say)


class Session:
    """Data, model, engine, checkpoints and run folder. Construction resumes from the newest complete checkpoint."""

    def __init__(self, config: Config):
        if platform.global_rank() == 0:
            _check_writable(Path(config.run.dir))
            prepare(config)  # once, before any group exists: bad data ends the run here; the other ranks find the rows
        self.config, self.ranks = config, init_parallel(config)
        self.folder: RunFolder | None = None
        dist.barrier()
        self.data, self.device = prepare(config), platform.device()
        model = build_model(config, self.ranks)
        self.updater = Updater(config, model, self.ranks)
        self.engine = _engine(config, model, self.ranks, self.say)
        self.step = RefineStep(config, model, self.engine, self.updater, self.ranks)
        self.heldout = HeldOut(self.step, self.data.valid, self.device)
        self.checkpoints = Checkpoints(Path(config.run.dir) / "checkpoints", config, self.ranks)
        self.progress = self._resume()
        self.stop = StopRequest()
        self.folder = RunFolder(config, self.progress.step, print) if self.ranks.is_main else None
        if self.folder:
            self.folder.keep_tokenizer(self.data.tokenizer)
        self.peak_flops = platform.peak_flops() * self.ranks.world

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: Any) -> None:
        self.engine.close()

    def _resume(self) -> Progress:
        fresh = Progress(data=self.data.train.fingerprint)
        latest = self.checkpoints.latest()
        if latest is None:
            if self.config.checkpoint.load:
                self.checkpoints.load_weights(Path(self.config.checkpoint.load), self.updater)
            return fresh
        progress = self.checkpoints.load(latest, self.updater)
        if progress.data != fresh.data:
            raise ConfigError(
                f"{latest}: the run was trained on other data (its rows have another fingerprint); restore data.* and "
                "model.vocab_size, or choose a new run.dir and start it with checkpoint.load"
            )
        return progress

    def say(self, line: str) -> None:
        if self.folder:
            self.folder.say(line)

    def next_batch(self) -> Batch:
        """This rank's sequences of the next batch."""
        c, r = self.config, self.ranks
        first = self.progress.consumed_samples
        samples = rank_samples(first, c.train.global_batch_size, c.mini_batch_size, r.dp_rank, r.dp)
        order = sample_rows(c.run.seed, first, c.train.global_batch_size, len(self.data.train))
        return self.data.train.batch(order[samples - first], samples).to(self.device)

    def train_step(self, refine: bool) -> dict[str, Any]:
        """One step; its metrics with speed. Moves the progress on."""
        start, done = time.perf_counter(), self.progress
        metrics = self.step(self.next_batch(), done.step, refine)
        platform.synchronize()
        seconds, size = time.perf_counter() - start, self.config.train.global_batch_size
        self.progress = Progress(done.step + 1, done.consumed_samples + size, done.data)
        flops = step_flops(self.config)
        metrics |= self.engine.metrics()
        return metrics | {
            "step": self.progress.step,
            "consumed_samples": self.progress.consumed_samples,
            "time/step": seconds,
            "perf/tokens_per_sec": size * self.config.data.seq_length / seconds,
            "perf/mfu": (flops.refine if refine else flops.ntp) / seconds / self.peak_flops,
            "perf/peak_memory_bytes": platform.peak_memory_bytes(),
        }

    def evaluate(self) -> dict[str, float]:
        """The eval/ metrics of the held-out sequences; {} where there are none to evaluate."""
        if not self.config.eval.sequences:
            return {}
        if self.config.refine.enabled:
            self.engine.sync(self.progress.step)
        metrics = self.heldout()
        if self.folder and self.heldout.sample:
            self.folder.save_samples(self._samples(*self.heldout.sample))
        self.heldout.sample = None
        return metrics

    def save(self) -> float:
        """Write a checkpoint; its seconds."""
        start = time.perf_counter()
        folder = self.checkpoints.save(self.progress, self.updater)
        seconds = time.perf_counter() - start
        self.say(f"checkpoint {folder} ({seconds:.1f}s)")
        return seconds

    def record(self, row: dict[str, Any]) -> None:
        if self.folder:
            self.folder.record(row)

    def _samples(self, batch: Batch, explored: Any) -> dict[str, Any]:
        """One sequence's entropy, positions and rollouts beside the true text, as the report reads them."""
        e, text = explored.experience, lambda ids: decode(self.data.tokenizer, ids.tolist())
        rollouts = [
            {"position": p, "prefix": text(batch.tokens[0, max(0, p - 40) : p]), "truth": text(explored.truth[0, i]),
             "rollout": text(e.tokens[0, i, j]), "reward": float(explored.rewards[0, i, j])}
            for i, p in enumerate(e.positions[0].tolist()) for j in range(e.tokens.shape[2])
        ]  # fmt: skip
        return {
            "step": self.progress.step,
            "entropy": explored.entropy[0, : int(batch.lengths[0])].tolist(),
            "positions": e.positions[0].tolist(),
            "rewards": explored.rewards.flatten().tolist(),
            "rollouts": rollouts,
        }
