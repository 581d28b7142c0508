"""What a study runs: bases, arms that go on from each, and what is compared. A file fixes it beforehand."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from megatron_refine.config import Config, ConfigError, Section, load
from megatron_refine.config.load import preset, read_as, shipped
from megatron_refine.config.paths import FilePaths, PathText, RequiredPath
from megatron_refine.config.words import settle_points, spell
from megatron_refine.files import digest, read_json, write_json
from megatron_refine.models.family import FAMILIES
from megatron_refine.study.documents import Documents

Metric = Literal["reward", "greedy match", "recall", "accuracy", "sampled accuracy", "loss", "entropy"]
Keys = dict[str, Any]


class Arm(Section):
    """A way to go on from a base."""

    keys: Keys = Field(default_factory=dict, description="of the configuration")
    seeds: int = Field(0, ge=0, description="continuations of each base; 0: as many as the study has")


class Contrast(Section):
    """Two arms that are compared, and what is asked."""

    arm: str
    against: str
    primary: Metric | None = Field(None, description="the arm is said to be better in this")
    guards: list[Metric] = Field(default_factory=list, description="and in these, corrected for their number")
    margins: dict[Metric, float] = Field(
        default_factory=dict, description="the arm is said to be no worse than this: below 0 where more is better"
    )


class Plan(Section):
    """The keys of the file. Paths are relative to the working directory."""

    out: RequiredPath = Field(description="folder of the runs")
    config: FilePaths = Field(min_length=1, description="configuration files of every run")
    models: dict[str, PathText] = Field(min_length=1, description="their files, by the names they have in tables")
    bases: int = Field(ge=2, description="models that arms go on from: of weights, language and texts of their own")
    seeds: int = Field(ge=1, description="continuations of a base: of texts and draws of their own")
    documents: Documents
    start: Keys = Field(description="keys of the training of a base")
    continued: Keys = Field(description="keys of every arm")
    arms: dict[str, Arm] = Field(min_length=2)
    contrasts: list[Contrast] = Field(min_length=1)


@dataclass(frozen=True)
class Run:
    """A training run. All arms of a base and seed learn from the same texts, and the same texts judge them."""

    model: str
    base: int
    arm: str  # "": the training of the base itself
    seed: int
    home: Path  # of the base
    name: str  # of the run's folder there
    keys: Keys  # of the configuration, beside those of the files

    @property
    def folder(self) -> Path:
        """Return the run's folder."""
        return self.home / self.name

    @property
    def texts(self) -> Path:
        """Return the file of texts that it learns from."""
        return self.home / f"texts_{self.seed if self.arm else 'base'}.jsonl"

    def held_out(self, kind: Literal["texts", "prompts"]) -> Path:
        """Return the file that judges it."""
        return self.home / f"held_out_{kind}.jsonl"

    def overrides(self, plan: Plan) -> list[str]:
        """Return the words of its command line, after the configuration files."""
        start = {} if self.arm else {"refine.start_step": self.keys["train.steps"]}
        given = {
            "run.dir": str(self.folder),
            "run.seed": 1000 * self.base + self.seed + 1,
            "data.tokenizer": str(self.home / "tokenizer.json"),
            "data.paths": [str(self.texts)],
            "data.valid_paths": [str(self.held_out("texts"))],
            "data.cache_dir": str(self.home / "cache"),
            "task.valid_paths": [str(self.held_out("prompts"))],
            "checkpoint.load": str(self.home / ("base" if self.arm else "start")),
        }
        words = [f"{key}={spell(value)}" for key, value in (start | given | self.keys).items()]
        return [f"model={plan.models[self.model]}", *words]

    def config(self, plan: Plan) -> Config:
        """Raises ConfigError."""
        return load(list(plan.config), self.overrides(plan), FAMILIES)


def read_plan(path: Path) -> Plan:
    """Raises ConfigError, for the runs' configurations too, and where its folder has the runs of another plan."""
    plan = read_as(path, Plan)
    for contrast in plan.contrasts:
        if unknown := {contrast.arm, contrast.against} - plan.arms.keys():
            raise ConfigError(f"{path}: contrasts: {min(unknown)}: no such arm; there are {', '.join(plan.arms)}")
    for run in (*bases(plan), *continuations(plan)):
        if run.base == 0:
            run.config(plan)
    _keep(plan, path)
    return plan


def _keep(plan: Plan, path: Path) -> None:
    """Write down the plan, and what its files hold: runs that have finished are not run again. Raises ConfigError where
    others were written down before, TornError for a damaged record."""
    record, tree = Path(plan.out) / "plan.json", plan.model_dump(mode="json")
    files = {name: digest(Path(file)) for name, file in _files(plan).items()}
    known = read_json(record) if record.exists() else tree
    before = known.pop("files", files) if isinstance(known, dict) else files
    if known != tree:
        raise ConfigError(f"{path}: {record} is of another plan; choose a new folder (out)")
    if changed := sorted(name for name in files if before.get(name) != files[name]):
        raise ConfigError(f"{path}: {changed[0]} has changed since the runs in {plan.out}; restore it, or choose a new "
                          "folder (out)")  # fmt: skip
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, tree | {"files": files})


def _files(plan: Plan) -> dict[str, str]:
    """Return the files of the runs' configurations, by the names that the plan gives them."""
    named = {name: shipped(name) for name in plan.config}
    return named | {name: shipped(preset(name)) for name in plan.models.values()}


def bases(plan: Plan) -> Iterator[Run]:
    """Yield the trainings of the bases."""
    for model in plan.models:
        for base in range(plan.bases):
            yield Run(model, base, "", 0, _home(plan, model, base), "base", _settled(plan.start))


def continuations(plan: Plan) -> Iterator[Run]:
    """Yield the runs of all arms."""
    for model in plan.models:
        for base in range(plan.bases):
            for seed in range(plan.seeds):
                for arm, settings in plan.arms.items():
                    if seed < (settings.seeds or plan.seeds):
                        keys, name = _settled(plan.continued | settings.keys), f"seed{seed}/{_name(arm)}"
                        yield Run(model, base, arm, seed, _home(plan, model, base), name, keys)


def _settled(keys: Keys) -> Keys:
    return settle_points([keys], Config, "keys")[0]


def _home(plan: Plan, model: str, base: int) -> Path:
    return Path(plan.out) / _name(model) / f"base{base}"


def _name(words: str) -> str:
    """Return the name of a folder."""
    return "_".join("".join(c if c.isalnum() else " " for c in words.lower()).split())
