"""A training run, set up: everything that train.py's loop uses, on every rank."""

import contextlib
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from megatron_refine import usage
from megatron_refine.checkpoint import resumption
from megatron_refine.checkpoint.checkpoints import Checkpoints, Progress
from megatron_refine.checkpoint.source import CHECKPOINTS, Source, find
from megatron_refine.config import Config, ConfigError
from megatron_refine.data.tokenizer import keep_tokenizer
from megatron_refine.engine.native import NativeEngine
from megatron_refine.estimate.flops import batch_flops
from megatron_refine.eval.answers import Answerer
from megatron_refine.eval.evaluation import weights_of
from megatron_refine.eval.heldout import HeldOut
from megatron_refine.eval.suite import TaskEvaluation, score_table
from megatron_refine.exchange import everyone
from megatron_refine.models import cost
from megatron_refine.phases.sources import Sources
from megatron_refine.phases.testtime import TestTime
from megatron_refine.platform import hardware
from megatron_refine.records import Batch, RolloutEngine
from megatron_refine.report.folder import RunFolder, read_progress
from megatron_refine.run.opening import claim, everywhere
from megatron_refine.run.signals import StopRequest
from megatron_refine.run.used import used
from megatron_refine.run.watchdog import Watchdog
from megatron_refine.step.refine import RefineStep
from megatron_refine.trainer.model import build_model
from megatron_refine.trainer.optimizer import Updater
from megatron_refine.trainer.parallel import Ranks, init_parallel


def _engine(config: Config, model: nn.Module, ranks: Ranks, say: Callable[[str], None]) -> RolloutEngine:
    if config.engine.cuda_graphs == "true" and not hardware.has_gpu():
        raise ConfigError("engine.cuda_graphs=true: there is no GPU here; leave it out")
    if config.engine.kind == "native" or not config.refine.enabled:
        graphs = config.cuda_graphs and hardware.has_gpu()
        return NativeEngine(model, graphs, required=config.engine.cuda_graphs == "true")
    from megatron_refine.engine.sglang import SGLangEngine

    return SGLangEngine(config, model, ranks, say)


_show = functools.partial(print, flush=True)  # what is said is seen, however the process ends


class Session:
    """Data, model, engine, checkpoints and run folder. Construction resumes from where the run stands.

    checked: this process has had the configuration's preflight.
    """

    def __init__(self, config: Config, watch: Watchdog, checked: bool = False):
        self.config, self.watch = config, watch
        self.folder: RunFolder | None = None
        self.code = 1  # of the command, once it is known
        self._owed: dict[str, float] = {}  # what the next row tells of this one's save
        self._offload_told = False
        self.changes: list[resumption.Change] = []
        # before anything long: SIGUSR1 would end the process
        self.stop = StopRequest(self._fenced, self._needed, self._save_due)
        with watch("preparation"):
            self.owner = claim(config, checked)
            self._build()
        with watch("resumption"):
            self.progress = self._resume()
        if self.ranks.is_main:
            begun = self.progress.step > 0  # what of the training is not as it was before this attempt
            self.changes = resumption.changes(self._past(), config, self.ranks.world) if begun else []
            with self.owner.held():
                self.folder = RunFolder(config, self.progress.step, self.phase.total_steps, _show)
                changed = {change.key: [change.new, change.old] for change in self.changes}
                self.folder.keep_attempt(self.progress.step, self.ranks.world, changed)
                keep_tokenizer(self.sources.tokenizer_path, self.sources.tokenizer, Path(config.run.dir))
        self._saved = time.monotonic()  # when nothing of the run could be lost, last

    def _build(self) -> None:
        config = self.config
        self.ranks = init_parallel(config)
        self.sources, device = everywhere(lambda: Sources.of(config)), hardware.device()
        parameters = cost.parameters(config.model)
        self._tell(f"building {config.model.family}, {parameters:,} parameters, on {usage.ranks(self.ranks.world)}")
        model = build_model(config, self.ranks)
        self.updater = Updater(config, model, self.ranks)
        self.engine = _engine(config, model, self.ranks, self.say)
        self.step = RefineStep(config, model, self.engine, self.updater, self.ranks, self.sources.tokenizer)
        self.answerer = Answerer(
            model, self.sources.tokenizer, self.ranks, bos=self.sources.bos,
            batch_size=config.eval.batch_size or config.train.micro_batch_size,
        )  # fmt: skip
        self.phase = self.sources.phase(self.step, self.answerer, device)
        everywhere(self._check_rows)
        valid = self.sources.documents and self.sources.documents.valid
        self.heldout = HeldOut(self.step, valid, device) if valid and config.eval.sequences else None
        self.tasks = everywhere(
            lambda: TaskEvaluation(config, self.answerer, self.sources.count_tokens, self._tell)
        )  # fmt: skip
        self.checkpoints = Checkpoints(Path(config.run.dir) / CHECKPOINTS, config, self.ranks, self.owner)
        self.watch.detail = lambda: self.step.clock.stage

    def _check_rows(self) -> None:
        """Raise ConfigError where this rank has read other rows than the first one."""
        first = everyone(self.phase.fingerprint)[0]
        if self.phase.fingerprint != first:
            raise ConfigError(
                "data: other rows than those of rank 0; put the files and data.cache_dir on a disk that all share"
            )

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: Any) -> None:
        try:
            self.engine.close()
        finally:
            if self.folder:
                self.folder.close(self.code)

    @property
    def used(self) -> str:
        """What the run computes with, in one line."""
        return used(self.config, self.updater.parts)

    @property
    def resumed(self) -> str:
        """Say which settings the attempt goes on with that were others before, in one line; "" without any."""
        done = self.progress
        return resumption.told(done.step, done.consumed_samples, self.changes) if self.changes else ""

    @property
    def total_steps(self) -> int:
        return self.phase.total_steps

    def _resume(self) -> Progress:
        config, rows, start = self.config, self.phase.fingerprint, ""
        progress = None if config.resets else self.checkpoints.load_latest(self.updater, self._tell)
        if progress is None:
            source = None
            if config.checkpoint.load:
                source = everywhere(lambda: find(Path(config.checkpoint.load), "checkpoint.load"))
                self.checkpoints.load_weights(source, self.updater)
            start = self._start(source) if config.resets else ""
            kept = read_progress(Path(config.run.dir)) if config.resets else None
            progress = Progress(**kept) if kept else Progress(data=f"{rows}+{start}" if start else rows)
        found, _, started = progress.data.partition("+")
        if found != rows:
            raise resumption.other_data(self._past(), config)
        if start and progress.step:
            self._check_start(started, start)
        return progress

    def _start(self, source: Source | None) -> str:
        """Return what tells the weights that each batch starts from from others. Collective."""
        return "-".join(everyone(weights_of(source) if self.ranks.is_main else [])[0]) if source else "random"

    def _check_start(self, was: str, now: str) -> None:
        """Raise ConfigError where batches before this attempt started from other weights. Earlier versions noted the
        name of those alone: `was` is empty."""
        load = self.config.checkpoint.load
        if was != now if was else self._past().differs("checkpoint.load", load):
            raise ConfigError(
                f"checkpoint.load={load}: is not what the batches so far have started from; name that again, or choose "
                "a new run.dir"
            )

    def _past(self) -> resumption.Past:
        """Read the configuration of what the attempt goes on from."""
        loaded = None if self.config.resets else self.checkpoints.loaded
        run = Path(self.config.run.dir)
        return resumption.past_of_checkpoint(loaded) if loaded else resumption.past_of_run(run)

    def say(self, line: str) -> None:
        if self.folder:
            self.folder.say(line)

    def note(self, error: Exception) -> None:
        """Keep what ended the run in the attempt's log: the screen may be gone."""
        if self.folder:
            with contextlib.suppress(OSError):  # the disk may be what ended it
                self.folder.note(f"{type(error).__name__}: {error}")

    def _tell(self, line: str) -> None:
        """Before there is a run folder."""
        if self.ranks.is_main:
            _show(line)

    def _fenced(self) -> bool:
        return self.ranks.is_main and self.owner.lost()

    def _save_due(self) -> bool:
        """Whether more than checkpoint.minutes would be lost if the next step failed. By the main rank's clock."""
        minutes = 0 if self.config.resets else self.config.checkpoint.minutes
        at_risk = time.monotonic() - self._saved + self.watch.longest.get("step", 0.0)
        return self.ranks.is_main and minutes > 0 and at_risk > 60 * minutes

    def _needed(self) -> float:
        """Seconds that the next step may take, with evaluation and save, and what is kept in reserve."""
        longest = self.watch.longest
        return sum(longest.get(x, 0.0) for x in ("step", "evaluation", "save")) + 60 * self.config.run.reserve_minutes

    def train_step(self, refine: bool) -> dict[str, Any]:
        """One batch; its metrics with speed. Moves the progress on."""
        start, done = time.perf_counter(), self.progress
        metrics = self.phase(done, refine)
        hardware.synchronize()
        seconds, size = time.perf_counter() - start, self.config.train.global_batch_size
        if self.phase.num_samples is not None:  # the last batch may be a part of one
            size = min(size, self.phase.num_samples - done.consumed_samples)
        self.progress = Progress(done.step + 1, done.consumed_samples + size, done.data)
        share = size / self.config.train.global_batch_size
        metrics |= self.engine.metrics() | self._owed
        if (away := metrics.get("engine/offloaded_bytes")) and not self._offload_told:
            self._offload_told = True
            what = "of gradients and optimizer state are in the host's memory during rollouts"
            self.say(f"offload: {away / 2**20:,.1f} MiB {what}")
        self._owed = {}
        if peak := hardware.peak_flops():
            work = share * batch_flops(self.config, refine)
            metrics["perf/mfu"] = work / seconds / peak / self.ranks.world
        return metrics | {
            "step": self.progress.step,
            "consumed_samples": self.progress.consumed_samples,
            "time/step": seconds,
            "perf/tokens_per_sec": size * self.config.data.seq_length / seconds,
            "perf/peak_memory_bytes": hardware.peak_memory_bytes(),
        }

    def evaluate(self) -> dict[str, float]:
        """The eval/ metrics of the held-out sequences and the task/ metrics of the tasks, of those there are."""
        metrics: dict[str, float] = {}
        if self.heldout:
            if self.heldout.explores:
                self.engine.sync(self.progress.step)
            metrics |= self.heldout()
            if self.folder and self.heldout.sample:
                with self.owner.held():
                    self.folder.save_samples(self._samples(*self.heldout.sample))
            self.heldout.sample = None
        scores = self.tasks()
        if scores:
            self.say(f"eval step {self.progress.step}: " + ", ".join(f"{label} {s}" for label, s in scores.items()))
        return metrics | {f"task/{label}": score.mean for label, score in scores.items()}

    def save(self) -> None:
        """Write a checkpoint; the next row of metrics has the seconds that it took from training. Nothing where each
        batch starts from the same weights."""
        if self.config.resets:
            return
        self.settle()
        start = time.perf_counter()
        folder = self.checkpoints.save(self.progress, self.updater)
        seconds, self._saved = time.perf_counter() - start, time.monotonic()
        if folder:
            self.say(f"checkpoint {folder} ({seconds:.1f}s)")
        self._owed = {"time/checkpoint": seconds}

    def settle(self, wait: bool = True) -> None:
        """Complete the checkpoint that is being written beside the training; wait: until its files are there."""
        folder = self.checkpoints.settle(wait)
        if folder:
            self.say(f"checkpoint {folder} (written in {time.monotonic() - self._saved:.1f}s beside the training)")

    def record(self, row: dict[str, Any]) -> None:
        """What there is to know of a step; where no checkpoint is written, the progress too. Raises FencedError."""
        if not self.folder:
            return
        with self.owner.held():
            if isinstance(self.phase, TestTime):
                self.folder.predictions.append(self.progress.step, map(vars, self.phase.predictions))
            self.folder.record(row)
            if self.config.resets:
                self.folder.keep_progress(vars(self.progress))

    def finish(self) -> None:
        """The end of the run, on the screen and as a report. Raises FencedError."""
        if not self.folder:
            return
        with self.owner.held():
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
