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
from megatron_refine.engine.native import NativeEngine
from megatron_refine.estimate.flops import batch_flops
from megatron_refine.eval.answers import Answerer
from megatron_refine.eval.heldout import HeldOut
from megatron_refine.eval.suite import TaskEvaluation, score_table
from megatron_refine.phases.sources import Sources
from megatron_refine.phases.testtime import TestTime
from megatron_refine.records import Batch, RolloutEngine
from megatron_refine.report.folder import RunFolder, read_progress
from megatron_refine.step.hooks import check_hooks
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
    if config.engine.cuda_graphs and not platform.has_gpu():
        raise ConfigError("engine.cuda_graphs=true: there is no GPU here; leave it out")
    if config.engine.kind == "native" or not config.refine.enabled:
        return NativeEngine(model, config.engine.cuda_graphs)
    from megatron_refine.engine.sglang import SGLangEngine

    return SGLangEngine(config, model, ranks, say)


class Session:
    """Data, model, engine, checkpoints and run folder. Construction resumes from where the run stands."""

    def __init__(self, config: Config):
        if platform.global_rank() == 0:
            _check_writable(Path(config.run.dir))
            check_hooks(config)
            # once, before any group exists: bad data ends the run here; the other ranks find the rows
            Sources.of(config)
        self.config, self.ranks = config, init_parallel(config)
        self.folder: RunFolder | None = None
        dist.barrier()
        self.sources, device = Sources.of(config), platform.device()
        model = build_model(config, self.ranks)
        self.updater = Updater(config, model, self.ranks)
        self.engine = _engine(config, model, self.ranks, self.say)
        self.step = RefineStep(config, model, self.engine, self.updater, self.ranks)
        self.answerer = Answerer(
            model, self.sources.tokenizer, self.ranks, bos=self.sources.bos,
            batch_size=config.eval.batch_size or config.train.micro_batch_size,
        )  # fmt: skip
        self.phase = self.sources.phase(self.step, self.answerer, device)
        valid = self.sources.documents and self.sources.documents.valid
        self.heldout = HeldOut(self.step, valid, device) if valid and config.eval.sequences else None
        self.tasks = TaskEvaluation(config, self.answerer, self.sources.count_tokens)
        self.checkpoints = Checkpoints(Path(config.run.dir) / "checkpoints", config, self.ranks)
        self.progress = self._resume()
        self.stop = StopRequest()
        if self.ranks.is_main:
            self.folder = RunFolder(config, self.progress.step, self.phase.total_steps, print)
            self.folder.keep_tokenizer(self.sources.tokenizer_path)
        self.peak_flops = platform.peak_flops() * self.ranks.world

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: Any) -> None:
        self.engine.close()

    @property
    def total_steps(self) -> int:
        return self.phase.total_steps

    def _resume(self) -> Progress:
        fresh = Progress(data=self.phase.fingerprint)
        latest = None if self.config.resets else self.checkpoints.latest()
        if latest is None:
            if self.config.checkpoint.load:
                self.checkpoints.load_weights(Path(self.config.checkpoint.load), self.updater)
            kept = read_progress(Path(self.config.run.dir)) if self.config.resets else None
            progress = Progress(**kept) if kept else fresh
        else:
            progress = self.checkpoints.load(latest, self.updater)
        if progress.data != fresh.data:
            raise ConfigError(
                f"{latest or self.config.run.dir}: the run was trained on other data (its rows have another "
                "fingerprint); restore data.*, task.* and model.vocab_size, or choose a new run.dir and start it with "
                "checkpoint.load"
            )
        return progress

    def say(self, line: str) -> None:
        if self.folder:
            self.folder.say(line)

    def train_step(self, refine: bool) -> dict[str, Any]:
        """One batch; its metrics with speed. Moves the progress on."""
        start, done = time.perf_counter(), self.progress
        metrics = self.phase(done, refine)
        platform.synchronize()
        seconds, size = time.perf_counter() - start, self.config.train.global_batch_size
        if self.phase.num_samples is not None:  # the last batch may be a part of one
            size = min(size, self.phase.num_samples - done.consumed_samples)
        self.progress = Progress(done.step + 1, done.consumed_samples + size, done.data)
        share = size / self.config.train.global_batch_size
        metrics |= self.engine.metrics()
        return metrics | {
            "step": self.progress.step,
            "consumed_samples": self.progress.consumed_samples,
            "time/step": seconds,
            "perf/tokens_per_sec": size * self.config.data.seq_length / seconds,
            "perf/mfu": share * batch_flops(self.config, refine) / seconds / self.peak_flops,
            "perf/peak_memory_bytes": platform.peak_memory_bytes(),
        }

    def evaluate(self) -> dict[str, float]:
        """The eval/ metrics of the held-out sequences and the task/ metrics of the tasks, of those there are."""
        metrics: dict[str, float] = {}
        if self.heldout:
            if self.config.refine.enabled:
                self.engine.sync(self.progress.step)
            metrics |= self.heldout()
            if self.folder and self.heldout.sample:
                self.folder.save_samples(self._samples(*self.heldout.sample))
            self.heldout.sample = None
        scores = self.tasks()
        if scores:
            self.say(f"eval step {self.progress.step}: " + ", ".join(f"{label} {s}" for label, s in scores.items()))
        return metrics | {f"task/{label}": score.mean for label, score in scores.items()}

    def save(self) -> dict[str, float]:
        """Write a checkpoint; its seconds. Nothing where each batch starts from the same weights."""
        if self.config.resets:
            return {}
        start = time.perf_counter()
        folder = self.checkpoints.save(self.progress, self.updater)
        seconds = time.perf_counter() - start
        self.say(f"checkpoint {folder} ({seconds:.1f}s)")
        return {"time/checkpoint": seconds}

    def record(self, row: dict[str, Any]) -> None:
        """What there is to know of a step; where no checkpoint is written, the progress too."""
        if self.folder:
            if isinstance(self.phase, TestTime):
                self.folder.predictions.append(self.progress.step, map(vars, self.phase.predictions))
            self.folder.record(row)
            if self.config.resets:
                self.folder.keep_progress(vars(self.progress))

    def finish(self) -> None:
        """The end of the run, on the screen and as a report."""
        if self.folder:
            if isinstance(self.phase, TestTime):
                self.say(score_table(self.folder.predictions.read()))
            self.folder.finish()

    def _samples(self, batch: Batch, explored: Any) -> dict[str, Any]:
        """One sequence's entropy, positions and rollouts beside the true text, as the report reads them."""
        e, text = explored.experience, lambda ids: self.sources.tokenizer.decode(ids.tolist())
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
