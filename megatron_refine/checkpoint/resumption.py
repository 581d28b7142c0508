"""What a resumed run does with a configuration that has changed: every key is applied, or refused by name.

A checkpoint holds the weights, Adam's moments and counters, and where the run stands. Rates, schedule, betas, eps and
weight decay are those of the configuration, as if they had always been so.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from megatron_refine.checkpoint.manifest import read_manifest
from megatron_refine.config import Config, ConfigError
from megatron_refine.files import TornError, read

if TYPE_CHECKING:  # what changed in a configuration is known without torch
    from megatron_refine.trainer.optimizer import Updater

# what a run is: another value makes another run
FIXED = ("run.seed", "train.phase", "train.precision", "ttt.reset", "optimizer.kind")
# what rows of documents are; paths may change where the rows stay the same, which their fingerprint tells
ROWS = ("data.seq_length", "data.min_length", "data.split_documents", "data.add_bos", "data.text_column")
# what else may decide the rows: told where the fingerprint differs
SOURCES = (
    "data.paths", "data.valid_paths", "data.valid_fraction", "data.valid_min_length", "data.tokenizer",
    "model.vocab_size", "task.paths",
    "task.prompt_column", "task.answer_column", "task.max_new_tokens", "task.add_eos", "task.skip_too_long",
)  # fmt: skip
# what changes the training of a run, or what its evaluations measure; the other keys change how it is watched, saved
# or computed
TOLD = ("parallel.", "optimizer.", "train.", "refine.", "update.", "task.inner_step", "task.answer_mean",
        "task.valid_paths", "engine.kind", "engine.lag", "engine.importance_cap", "engine.mask_gap", "eval.sequences",
        "eval.selection", "eval.tasks", "eval.lengths", "eval.examples", "eval.data", "eval.essays")  # fmt: skip
UNTOLD = ("train.recompute", "train.recompute_modules", "train.backend", "train.max_skipped_steps")


@dataclass(frozen=True)
class Past:
    """The configuration of what a run goes on from."""

    source: Path  # a checkpoint, or the run's folder
    values: dict[str, Any]  # "section.key" -> value; without those that the version that wrote it did not have
    ranks: int | None  # None: not known

    def differs(self, key: str, value: Any) -> bool:
        """Whether a key is known to have had another value."""
        return key in self.values and self.values[key] != value


@dataclass(frozen=True)
class Change:
    key: str
    new: Any
    old: Any

    def __str__(self) -> str:
        return f"{self.key} {_number(self.new)}, was {_number(self.old)}"


def past_of_checkpoint(checkpoint: Path) -> Past:
    """What a run's checkpoint was written with. One of an earlier version does not say: config.yaml does, of the
    attempt that began last.

    Raises CheckpointError where the manifest, ConfigError where config.yaml cannot be read.
    """
    manifest = read_manifest(checkpoint)
    if "config" in manifest:
        return Past(checkpoint, _flat(manifest["config"]), manifest["ranks"])
    return Past(checkpoint, past_of_run(checkpoint.parents[1]).values, None)


def past_of_run(run: Path) -> Past:
    """What the last attempt at a run was configured as. Raises ConfigError where config.yaml cannot be read."""
    path = run / "config.yaml"
    try:
        tree = yaml.safe_load(read(path)) if path.exists() else {}
    except (OSError, TornError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {' '.join(str(error).split())}; delete it or restore it") from None
    return Past(run, _flat(tree), None)


def refuse(past: Past, config: Config) -> None:
    """Raises ConfigError, a line a key, where the configuration is that of another run."""
    now = _flat(config.model_dump(serialize_as_any=True))
    fixed = FIXED + (("train.global_batch_size",) if now["train.phase"] == "testtime" else ())
    lines = [
        f"{change.key}={change.new}: {past.source} was trained with {change.old}, which cannot change within a run; "
        "set it back, or start a new run from this one: another run.dir, with checkpoint.load"
        for change in _changes(past, now) if change.key in fixed
    ]  # fmt: skip
    if lines:
        raise ConfigError("\n".join(lines))
    if config.train.phase == "midtrain" and any(change.key in ROWS for change in _changes(past, now)):
        raise other_data(past, config)


def other_data(past: Past, config: Config) -> ConfigError:
    """The error of a run whose rows are not those that it was trained on."""
    found = _changes(past, _flat(config.model_dump(serialize_as_any=True)))
    named = "; ".join(str(change) for change in found if change.key in ROWS + SOURCES)
    return ConfigError(
        f"{past.source}: the run was trained on other data ({named or 'its rows have another fingerprint'}); restore "
        "data.*, task.* and model.vocab_size, or choose a new run.dir and start it with checkpoint.load"
    )


def changes(past: Past, config: Config, ranks: int) -> list[Change]:
    """What of the training is not as it was, in the order of the configuration."""
    found = _changes(past, _flat(config.model_dump(serialize_as_any=True)))
    untold = UNTOLD + (("train.steps",) if config.train.phase == "testtime" else ())  # there the prompts are counted
    told = [change for change in found if change.key.startswith(TOLD) and change.key not in untold]
    return told + ([Change("ranks", ranks, past.ranks)] if past.ranks not in (None, ranks) else [])


def told(step: int, samples: int, found: list[Change]) -> str:
    """The line of a resumed run whose training is not as it was."""
    size = any(change.key == "train.global_batch_size" for change in found)
    order = f"; the data go on with sample {samples}: none is skipped or repeated" if size else ""
    return f"resumed at step {step} with {'; '.join(map(str, found))}{order}"


def restore(updater: "Updater", optimizer: Any, scheduler: Mapping[str, Any]) -> None:
    """Give the updater the moments, the counters and the step of a checkpoint's states, and keep its own settings.

    Megatron's load would bring the settings too: of the groups (rates, betas, eps, weight decay) and of the schedule.
    """
    settings = [_settings(group) for group in _groups(updater)]
    updater.optimizer.load_state_dict(optimizer)
    for group, own in zip(_groups(updater), settings, strict=True):
        group.update(own)
    updater.scheduler.num_steps = scheduler["num_steps"]
    updater.scheduler.step(0)  # rate and weight decay of this step


def _groups(updater: "Updater") -> Iterator[dict[str, Any]]:
    return (group for part in updater.parts for group in part.optimizer.param_groups)


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """All of a group but what training moves: fused Adams count their steps in it."""
    return {key: value for key, value in group.items() if key not in ("params", "step")}


def _flat(tree: Any) -> dict[str, Any]:
    """ "section.key" -> value."""
    sections = tree.items() if isinstance(tree, Mapping) else ()
    return {f"{name}.{key}": value for name, section in sections if isinstance(section, Mapping)
            for key, value in section.items()}  # fmt: skip


def _changes(past: Past, now: Mapping[str, Any]) -> list[Change]:
    """Compare all keys that both have. A length of 0 means that of a row. Versions without Muon had Adam."""
    shortest = "data.min_length"
    was = {"optimizer.kind": "adam", **past.values}
    old, new = ({**x, shortest: x.get(shortest) or x.get("data.seq_length")} for x in (was, now))
    return [Change(key, now[key], was[key]) for key in now if key in was and old[key] != new[key]]


def _number(value: Any) -> str:
    """As one writes it: 1e-5, not 1e-05."""
    if isinstance(value, float) and value and not 1e-3 <= abs(value) < 1e6:
        return format(Decimal(repr(value)).normalize(), "e")
    return str(value).lower() if isinstance(value, bool) else str(value)
