"""What a reproduction is made from: models, data, scale; and whether it is all there."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_refine.checkpoint.source import find
from megatron_refine.config import ConfigError
from megatron_refine.config.paths import expand
from megatron_refine.data.corpus import find_files
from megatron_refine.data.formats import named
from megatron_refine.data.tokenizer import FILES
from megatron_refine.errors import CheckpointError
from megatron_refine.eval import files
from megatron_refine.eval.tasks import TASKS
from megatron_refine.reproduce.items import ITEMS, LENGTHS, LONGBENCH, MODELS, START

PAPER = {length: length for length in LENGTHS}


@dataclass(frozen=True)
class Setting:
    """Everything but the item and the model. Paths are as they were given."""

    out: Path  # of this scale: folders of runs and evaluations, pages
    scale: str = "full"
    ranks: int = 8
    start: Mapping[str, str] = field(default_factory=dict)  # model: its released weights; none: a run of our own
    tokenizer: str = ""
    train_data: tuple[str, ...] = ()
    booksum: tuple[str, ...] = ()
    ruler_qa: str = ""
    longbench: str = ""
    essays: str = ""
    text: str = ""
    tasks: str = ""  # folder of further tasks of lm-evaluation-harness
    overrides: tuple[str, ...] = ()
    size: tuple[str, ...] = ()  # overrides of a tiny run
    niah: Mapping[int, int] = field(default_factory=PAPER.copy)  # length in the paper: length here
    qa: Mapping[int, int] = field(default_factory=PAPER.copy)
    short: Mapping[str, str] = field(default_factory=dict)  # task and metric in the paper: those here
    seeds: int = 3
    examples: int = 0  # of each task; 0: all
    nodes: int = 0  # 0: trainings run on this machine
    site: str = ""
    node_ranks: int = 0

    @property
    def world(self) -> int:
        """Return the most ranks of a training."""
        return self.nodes * self.node_ranks or self.ranks

    @property
    def tiny(self) -> bool:
        return self.scale == "tiny"

    def tokenizer_of(self, model: str) -> str:
        """Return what trainings of the model read. Raises ConfigError where the model came without one."""
        if self.tokenizer:
            return self.tokenizer
        start = self.start[model]
        found = [place / name for place in find(Path(start), "--start").beside for name in FILES]
        for path in found:
            if path.exists():
                return str(path)
        raise ConfigError(f"--start {model}={start}: no {' or '.join(FILES)} came with it; name one with --tokenizer")

    def qa_file(self, model: str, task: str, length: int, split: str) -> Path:
        """Return the file of RULER QA: ruler_squadqa_lact_4096_1600_train.parquet, with the model's family or without.

        Raises ConfigError where there is none, or several.
        """
        family = model.rsplit("_", 1)[0]
        name = re.compile(rf"{task}(_{family})?_{self.qa[length]}(_\d+)?_{split}")
        tables = [path for _, path in find_files([self.ruler_qa], "--ruler-qa").files if named(path)[1].is_table]
        found = [path for path in tables if name.fullmatch(named(path)[0])]
        if len(found) != 1:
            example = f"{task}_{family}_{self.qa[length]}_{'1600_train' if split == 'train' else '200_test'}.parquet"
            raise ConfigError(f"--ruler-qa {self.ruler_qa}: {len(found)} files like {example}; name a folder with one")
        return found[0]

    def longbench_file(self, task: str) -> Path:
        return files.find(TASKS[task], self.longbench, "--longbench")


def check(setting: Setting, items: Iterable[str], models: Iterable[str]) -> None:
    """Raise ConfigError, a line a problem, for what the items lack."""
    kinds = {ITEMS[item].kind for item in items}
    trains = any(row.runs != (START,) for item in items for row in ITEMS[item].rows)
    needed = {
        "--train-data": (trains and not setting.train_data, "documents of 16K tokens and more to mid-train on"),
        "--booksum": (trains and not setting.booksum, "held-out documents of every mid-training"),
        "--ruler-qa": ("ruler_qa" in kinds and not setting.ruler_qa, "the folder of RULER's question answering"),
        "--longbench": ("longbench" in kinds and not setting.longbench, "the folder of LongBench's files"),
        "--text": ("entropy" in kinds and not setting.text, "a text"),
    }
    problems = [f"{option}: missing; name {what}" for option, (lacks, what) in needed.items() if lacks]
    for model in models if not setting.tiny else ():
        if model not in setting.start:
            problems.append(f"--start: missing for {model}; name its released weights, --start {model}=FOLDER")
            continue
        problems += _problem(find, Path(setting.start[model]), "--start") or _problem(setting.tokenizer_of, model)
    if not problems and "ruler_qa" in kinds:
        for model in models:
            for task in ("ruler_squadqa", "ruler_hotpotqa"):
                for length in setting.qa:
                    problems += [*_problem(setting.qa_file, model, task, length, "train"),
                                 *_problem(setting.qa_file, model, task, length, "test")]  # fmt: skip
    if not problems and "longbench" in kinds:
        problems += [line for task in LONGBENCH for line in _problem(setting.longbench_file, task)]
    paths = [(name, path) for name in ("train_data", "booksum") for path in getattr(setting, name)]
    paths += [(name, getattr(setting, name)) for name in ("tokenizer", "essays", "text", "site")]
    for name, path in paths:
        if path and not Path(path).exists():
            problems.append(f"--{name.replace('_', '-')} {path}: no such file or folder; correct the path")
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))


def _problem(question: object, *arguments: object) -> list[str]:
    try:
        question(*arguments)  # type: ignore[operator]
    except (ConfigError, CheckpointError) as error:
        return str(error).splitlines()
    return []


def starts(words: Iterable[str]) -> dict[str, str]:
    """Read `MODEL=FOLDER`. Raises ConfigError."""
    found: dict[str, str] = {}
    for word in words:
        model, equals, folder = word.partition("=")
        if not equals or model not in MODELS:
            raise ConfigError(f"--start {word}: reads MODEL=FOLDER, MODEL one of {', '.join(MODELS)}")
        try:
            found[model] = expand(folder)
        except ValueError as error:
            raise ConfigError(f"--start {word}: {error}") from None
    return found
