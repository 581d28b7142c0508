"""Checkpoints through Megatron's dist_checkpointing: weights, Adam, schedule, random streams and progress; reshardable.

A failure on any rank is raised on all of them, so that none waits for another.
"""

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # noqa: F401  without it Megatron's writer hangs: fail at import instead
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.api import CheckpointException

from megatron_refine.checkpoint.manifest import (
    ORIGIN,
    TEMPORARY,
    WEIGHTS_ONLY,
    Files,
    check_files,
    complete_folders,
    discard,
    hashes,
    model_in,
    own_folders,
    read_manifest,
    seal,
    step_folder,
    unfinished_folders,
)
from megatron_refine.checkpoint.origin import carry
from megatron_refine.checkpoint.ownership import Ownership
from megatron_refine.checkpoint.pending import ARGUMENTS, Pending
from megatron_refine.checkpoint.pickles import check_pickles
from megatron_refine.checkpoint.resumption import restore
from megatron_refine.checkpoint.source import Source, differences
from megatron_refine.config import Config
from megatron_refine.convert.source import HFSource
from megatron_refine.errors import CheckpointError, DamagedError, FencedError, lost_rank
from megatron_refine.exchange import everyone
from megatron_refine.platform.megatron import streams
from megatron_refine.platform.megatron.saves import shield_saves
from megatron_refine.trainer import muon
from megatron_refine.trainer.model import RefineModel, unwrap
from megatron_refine.trainer.optimizer import Updater
from megatron_refine.trainer.parallel import Ranks
from megatron_refine.trainer.parity import load as load_shards

_KINDS: tuple[type[CheckpointError], ...] = (DamagedError, FencedError)  # told apart across ranks
# the one format of the distributed optimizer that loads at any tp, pp, cp and dp
_OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int = 0  # batches done
    consumed_samples: int = 0
    data: str = ""  # fingerprint of the rows


class Checkpoints:
    """The checkpoints of a run, in `root`; written while `owner`, if one is given, owns the run's folder."""

    def __init__(self, root: Path, config: Config, ranks: Ranks, owner: Ownership | None = None):
        self.root, self.config, self.ranks, self.owner = root, config, ranks, owner
        self._origin: Path | None = None  # the checkpoint that this attempt goes on from, or wrote last
        self._kept: Path | None = None  # the hf/ folder that goes into the next one
        self._pending: Pending | None = None  # whose files are being written

    @property
    def loaded(self) -> Path | None:
        """The checkpoint that this attempt goes on from, or that it wrote last."""
        return self._origin

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        found = complete_folders(self.root)
        return found[-1] if found else None

    def load_latest(self, updater: Updater, say: Callable[[str], object]) -> Progress | None:
        """Restore the newest checkpoint; None where there is none. With checkpoint.fallback a damaged one is passed
        over for the one before it, and `say` is told. Raises CheckpointError on all ranks."""
        found = complete_folders(self.root)
        while found:
            try:
                return self.load(found.pop(), updater)
            except DamagedError as error:
                if not found or not self.config.checkpoint.fallback:
                    raise
                say(f"{error}; checkpoint.fallback: going on from {found[-1].name}")
        return None

    def save(self, progress: Progress, updater: Updater) -> Path | None:
        """Write a checkpoint; the previous ones stay until it is complete. Raises CheckpointError on all ranks.

        Returns its folder. With checkpoint.async, None: the files are being written, and `settle` completes it. The
        folder of an attempt has its name, so that a fenced one cannot write into another's.
        """
        self.settle()
        shield_saves()
        final = step_folder(self.root, progress.step)
        folder = self.root / f"{TEMPORARY}{self.owner.name + '-' if self.owner else ''}{final.name}"
        needed = self._bytes(updater)
        self._together("prepare", folder, lambda: self._owned(lambda: self._clear(folder, needed)), only_main=True)
        state = self._collective("gather", folder, lambda: self._state(updater, loading=False))
        state["progress"] = dict(vars(progress))
        contents = {
            "step": progress.step,
            "model": self.config.model.model_dump(),
            "layout": self._layout(),
            "config": self.config.model_dump(serialize_as_any=True),
            "ranks": self.ranks.world,
        }
        if not self.config.checkpoint.waits:
            request = self._collective("save", folder, lambda: dist_checkpointing.save(state, str(folder), **ARGUMENTS))
            rank = self.ranks.rank
            self._pending = self._together("save", folder, lambda: Pending(request, folder, rank, contents))
            return None
        self._collective("save", folder, lambda: dist_checkpointing.save(state, str(folder)))
        files = self._together("hash", folder, lambda: hashes(folder, self.ranks.rank, self.ranks.world))
        return self._complete(folder, contents, _of_all_ranks(files))

    def settle(self, wait: bool = True) -> Path | None:
        """Complete the checkpoint that is being written, once all ranks have their files; wait: until they have.

        Returns its folder, None where there is none or it goes on. Collective. Raises CheckpointError on all ranks.
        """
        pending = self._pending
        if not pending or (not wait and any(everyone(pending.running()))):
            return None
        self._pending, folder = None, pending.folder
        files = self._together("save", folder, pending.files)
        self._collective("save", folder, lambda: [finish() for finish in pending.finish])
        known = _of_all_ranks(files)
        rest = self._together("hash", folder, lambda: pending.rest(known), only_main=True)
        return self._complete(folder, pending.contents, known | (rest or {}))

    def _complete(self, folder: Path, contents: dict[str, Any], files: Files) -> Path:
        """Make what is written in `folder` a checkpoint. files: all of it, on the main rank."""
        final = step_folder(self.root, contents["step"])
        contents = contents | {"files": files}
        self._together("complete", final, lambda: self._owned(lambda: self._seal(folder, final, contents)),
                       only_main=True)  # fmt: skip
        self._went_on_from(final)
        return final

    def load(self, folder: Path, updater: Updater) -> Progress:
        """Restore weights, Adam's state, step of the schedule, random streams, at any layout; settings are those of the
        configuration. Raises CheckpointError on all ranks."""
        manifest = self._verify(folder)
        if manifest.get(WEIGHTS_ONLY):
            raise CheckpointError(
                f"{folder}: holds weights only, so a run cannot resume from it; move it out of the run's folder and "
                "start a new run with checkpoint.load=<its new place>"
            )
        same_layout = manifest["layout"] == self._layout()
        state = self._collective("gather", folder, lambda: self._state(updater, loading=True, rng=same_layout))
        state["progress"] = None
        state = self._collective("load", folder, lambda: dist_checkpointing.load(state, str(folder)))
        progress = self._collective("restore", folder, lambda: self._restore(state, updater))
        self._went_on_from(folder)
        return progress

    def load_weights(self, source: Source, updater: Updater) -> None:
        """Start a new run from a model's weights, with a fresh optimizer. Raises as `load_model` does."""
        self.load_model(source, unwrap(updater.model))
        updater.optimizer.reload_model_params()
        if source.is_checkpoint:
            self._went_on_from(source.folder)
        kept = self._kept = self.root / ".hf"  # where the model came from may be gone at the first save
        self._together("keep", kept, lambda: self._owned(lambda: carry(source, kept)), only_main=True)

    def load_model(self, source: Source, model: RefineModel) -> None:
        """Fill a model alone, of any layout and dtype. Raises CheckpointError, and of a folder in Hugging Face's format
        ConversionError, on all ranks."""
        folder = source.folder
        if source.is_checkpoint:
            self._verify(folder)
            return self._collective("load", folder, lambda: load_weights(model, folder))
        self._same_model(source)
        load_shards(model, HFSource(folder), self.ranks)

    def _went_on_from(self, folder: Path) -> None:
        self._origin, self._kept = folder, folder / ORIGIN

    def _restore(self, state: dict[str, Any], updater: Updater) -> Progress:
        """Give the parts what was read for them."""
        _fill(unwrap(updater.model), state["model"])
        restore(updater, state["optimizer"], state["scheduler"])
        if "rng" in state:
            streams.set_rng_state(state["rng"])
        return Progress(**state["progress"])

    def _state(self, updater: Updater, loading: bool, rng: bool = True) -> dict[str, Any]:
        model = _weights(unwrap(updater.model))
        for part in updater.parts:
            if loading and not part.optimizer.state:  # a fused Adam has no state to load into before its first step
                part._init_optimizer_states_with_dummy_values()
        optimizer = updater.optimizer.sharded_state_dict(model, is_loading=loading, metadata=_OPTIMIZER_FORMAT)
        if self.config.optimizer.kind == "muon":
            muon.number_steps(optimizer, updater.parts)
        state = {"model": model, "optimizer": optimizer, "scheduler": updater.scheduler.state_dict()}
        if rng:
            place = (self.ranks.world,), (self.ranks.rank,)
            state["rng"] = ShardedObject("rng", streams.rng_state(), *place)
        return state

    def _layout(self) -> list[int]:
        """Ranks that agree in it have the same random streams. Checkpoints of old name no cp: they agree with none."""
        return [self.ranks.tp, self.ranks.pp, self.ranks.dp, self.ranks.cp]

    def _bytes(self, updater: Updater) -> int:
        """Bytes of a checkpoint: each weight in its own precision; in fp32 the weight again and Adam's two moments. (Of
        Muon's it has one.)"""
        local = sum(p.numel() * (p.element_size() + 12) for p in unwrap(updater.model).parameters())
        return sum(everyone(local)) // (self.ranks.dp * self.ranks.cp)

    def _clear(self, folder: Path, needed: int) -> None:
        """Make an empty folder for the save, on a disk that has room for it."""
        self.root.mkdir(parents=True, exist_ok=True)
        for stale in unfinished_folders(self.root):
            shutil.rmtree(stale)
        free = shutil.disk_usage(self.root).free
        if free < needed:
            raise CheckpointError(
                f"{folder}: disk full: a checkpoint takes {needed / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free; "
                "earlier checkpoints are intact: make room and run the same command again"
            )
        folder.mkdir()
        if self._kept and self._kept.is_dir():
            shutil.copytree(self._kept, folder / ORIGIN)

    def _owned(self, action: Callable[[], None]) -> None:
        with self.owner.held() if self.owner else contextlib.nullcontext():
            action()

    def _seal(self, folder: Path, final: Path, contents: dict[str, Any]) -> None:
        """Complete the checkpoint and remove old ones. Later steps than its own are not this run's past: they stay."""
        seal(folder, final, contents)
        found = own_folders(self.root)
        for old in found[: found.index(final) + 1][: -self.config.checkpoint.keep]:
            discard(old)

    def _verify(self, folder: Path) -> dict[str, Any]:
        share = self.ranks.rank, self.ranks.world

        def check() -> dict[str, Any]:
            manifest = read_manifest(folder)
            check_files(folder, manifest["files"], *share)
            self._same_model(Source(folder, model_in(folder, manifest), is_checkpoint=True))
            return manifest

        manifest: dict[str, Any] = self._together("verify", folder, check)
        self._together("verify", folder, lambda: check_pickles(folder, manifest["files"], *share))
        return manifest

    def _same_model(self, source: Source) -> None:
        if found := differences(source, self.config.model):
            raise CheckpointError(f"{source.folder}: of another model; set {' '.join(found)}, or name another")

    def _together(self, phase: str, where: Path, action: Callable[[], Any], only_main: bool = False) -> Any:
        """Run a local `action` on every rank (or the main one). Its result, or one CheckpointError on every rank."""
        result, failure = None, None  # or a message and which of _KINDS
        if self.ranks.is_main or not only_main:
            try:
                result = action()
            except Exception as error:  # whatever is raised must reach the ranks that would wait for this one
                kinds = [i for i, kind in enumerate(_KINDS) if isinstance(error, kind)]
                failure = _explain(phase, where, error), kinds
        for rank, found in enumerate(everyone(failure)):
            if found is not None:
                message, kinds = found
                error_type = _KINDS[kinds[0]] if kinds else CheckpointError
                raise error_type(f"{message} (rank {rank})" if self.ranks.world > 1 else message)
        return result

    def _collective(self, phase: str, where: Path, action: Callable[[], Any]) -> Any:
        """Run an `action` with collectives of its own. Its result, or a CheckpointError.

        A rank that fails alone cannot tell the others, which are inside the action: it raises, ends the run, and they
        fail on the closed connection.
        """
        try:
            return action()
        except (Exception, CheckpointException) as error:  # torch's is no Exception
            if self.owner:
                self.owner.check()  # another attempt may have removed the files
            if lost_rank(error):
                raise
            raise CheckpointError(f"{_explain(phase, where, error)} (rank {self.ranks.rank})", alone=True) from None


def _of_all_ranks(files: Files) -> Files:
    """Gather the files that each rank has counted."""
    return {name: value for part in everyone(files) for name, value in part.items()}


def load_weights(model: RefineModel, folder: Path) -> None:
    """Fill this rank's part of the model from a checkpoint of any layout and dtype, whose pickles were checked."""
    _fill(model, dist_checkpointing.load({"model": _weights(model)}, str(folder))["model"])


def _weights(model: RefineModel) -> dict[str, Any]:
    """What a checkpoint has of the model: Megatron's linear layers each have an extra state beside, always empty.

    (Of Transformer Engine it is a pickle: never to be taken from a file.)
    """
    return {name: value for name, value in model.sharded_state_dict().items() if not name.endswith("_extra_state")}


def _fill(model: RefineModel, state: dict[str, Any]) -> None:
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("_extra_state") for name in missing), (missing, unexpected)


def _explain(phase: str, where: Path, error: BaseException) -> str:
    """What failed, on one line: the innermost cause."""
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, CheckpointException):
        failed = [f"rank {rank}: {' '.join(str(cause).split())}" for rank, (cause, _) in error.failures.items()]
        return f"{where}: {phase} failed: {'; '.join(failed) or 'on another rank'}; earlier checkpoints are intact"
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return f"{where}: {phase} failed: {cause}; earlier checkpoints are intact"
