"""The commands that an item takes for a model, in their order. Runs and evaluations are shared by all items."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from megatron_refine.checkpoint.manifest import COMPLETE, complete_folders, last_step
from megatron_refine.checkpoint.source import CHECKPOINTS
from megatron_refine.config import Config, load
from megatron_refine.config.words import spell
from megatron_refine.estimate.flops import total_steps
from megatron_refine.eval.results import SCORES
from megatron_refine.files import TornError, read, read_json
from megatron_refine.models.family import FAMILIES
from megatron_refine.reproduce.items import ITEMS, LONGBENCH, MAIN, RUNS, SFT, START, Run
from megatron_refine.reproduce.setting import Setting

_RULER_QA = ("ruler_squadqa", "ruler_hotpotqa")
_WHOLE = "longbench"  # all its files in one run
DOCUMENTS = 9600  # held-out ones of an evaluation in figure 4


@dataclass(frozen=True)
class Job:
    """A command of megatron-refine, and what tells that it is done."""

    name: str
    words: tuple[str, ...]
    result: Path  # the run folder of a training, the folder of rows, or the file that another command writes last
    ranks: int = 1
    config: Config | None = None  # of a training
    labels: tuple[str, ...] = ()  # of an evaluation
    reads: str = ""  # weights that an evaluation asks, or that a training starts from

    @property
    def source(self) -> str:
        """What `reads` holds now: the digest of a run's newest checkpoint, "" where there is none."""
        found = complete_folders(Path(self.reads) / CHECKPOINTS) if self.reads else []
        return read(found[-1] / COMPLETE)[:12] if found else ""

    @property
    def done(self) -> bool:
        """Whether its result is there: the last checkpoint, the report of a test-time run, all scores, the file; of
        `prepare` the packed rows of both sides."""
        if self.words[0] == "prepare":
            return len([*self.result.glob("*/*.idx")]) > 1
        if self.config is None:
            return self.result.exists() and set(self.labels) <= scores_in(self.result).keys()
        if self.config.train.phase == "testtime":
            return answered(self.result)
        return last_step(self.result / CHECKPOINTS) >= total_steps(self.config)


def answered(folder: Path) -> bool:
    """Tell whether a test-time run has answered all of its prompts: only then it writes its report."""
    return (folder / "report.html").exists()


def scores_in(path: Path) -> dict[str, dict[str, float]]:
    """Return the scores of an evaluation by label; {} where the file holds none."""
    if path.name != SCORES:
        return {}
    try:
        found: dict[str, dict[str, float]] = read_json(path)["tasks"]
    except (OSError, TornError, TypeError, KeyError):
        return {}
    return found


class Chain:
    """All commands for one model."""

    def __init__(self, setting: Setting, model: str):
        self.setting, self.model, self.folder = setting, model, setting.out / model

    def jobs(self, item: str) -> Iterator[Job]:
        """Yield what the item takes, each command after those whose results it reads; some of them several times."""
        kind = ITEMS[item].kind
        for row in ITEMS[item].rows:
            for run in self.seeds(row.runs):
                for part in self.parts(run, kind):
                    yield from self.trained(run, part)
                yield from self.scored(run, kind)

    def seeds(self, runs: tuple[str, ...]) -> tuple[str, ...]:
        return runs[: self.setting.seeds]

    def parts(self, run: str, kind: str) -> tuple[str, ...]:
        """Return the runs of an arm: one for each task and length of RULER QA, and for each task at test time."""
        if _phase(run) == "midtrain":
            return ("",)
        if kind == "ruler_qa":
            return tuple(f"{task}@{length}" for task in _RULER_QA for length in self.setting.qa)
        return (_WHOLE,) if self.setting.tiny else LONGBENCH  # weights carry over in a run: one a task

    def place(self, run: str, part: str = "") -> Path:
        """Return the folder of a run."""
        return self.folder / run / part.replace("@", "_") if part else self.folder / run

    def weights(self, run: str, part: str = "") -> str:
        """Return what an evaluation, or a run that starts from them, reads."""
        given = self.setting.start.get(self.model, "")
        return given if run == START and given else str(self.place(run, part))

    def trained(self, run: str, part: str = "") -> Iterator[Job]:
        """Yield the run and, before it, those whose weights it starts from."""
        if run == START and self.setting.start.get(self.model):
            return
        spec = RUNS.get(run) or Run("midtrain", "", (SFT,))
        before = part if _phase(spec.start) == "posttrain" else ""
        if spec.start:
            yield from self.trained(spec.start, before)
        overrides = [*self._data(run, spec, part), *spec.keys, *self._size(spec), *self.setting.overrides]
        files = [f"configs/{spec.phase}_{self.model}.yaml", "configs/official.yaml"]
        if spec.phase == "midtrain":
            words = ["prepare", *_configured(files), *overrides]
            yield Job(self._relative(self.folder / "prepare"), tuple(words), self.folder / "rows")
        if spec.start:
            overrides.append(f"checkpoint.load={spell(self.weights(spec.start, before))}")
        overrides.append(f"run.dir={spell(str(self.place(run, part)))}")
        config = _loaded(tuple(files), tuple(overrides))
        size = config.parallel.model_size  # replicas divide a mini-batch
        limit = config.mini_batch_size // config.train.micro_batch_size
        ranks = size * max(1, math.gcd(max(1, self.setting.world // size), limit))
        words = ["train", *(["--ranks", str(ranks)] if ranks > 1 else [])]
        words += [*_configured(files), *overrides]
        place = self.place(run, part)
        yield Job(self._relative(place), tuple(words), place, ranks, config, reads=config.checkpoint.load)

    def _data(self, run: str, spec: Run, part: str) -> list[str]:
        setting = self.setting
        tokenizer = setting.tokenizer_of(self.model)
        found = [f"data.tokenizer={spell(tokenizer)}", f"data.cache_dir={spell(str(self.folder / 'rows'))}"]
        if spec.phase == "midtrain":
            found += [f"data.paths={spell(list(setting.train_data))}",
                      f"data.valid_paths={spell(list(setting.booksum))}", "data.valid_min_length=1"]  # fmt: skip
            seeds = run.startswith(MAIN) and run.partition("_seed")[0] in MAIN
            return found + ([f"eval.sequences={DOCUMENTS}", "eval.rollouts=false"] if seeds else [])
        task, _, length = part.partition("@")
        if length:
            split = "train" if spec.phase == "posttrain" else "test"
            paths = [setting.qa_file(self.model, task, int(length), split)]
            found.append(f"data.seq_length={setting.qa[int(length)]}")
        else:
            paths = [setting.longbench_file(each) for each in (LONGBENCH if part == _WHOLE else (part,))]
        found.append(f"task.paths={spell([str(path) for path in paths])}")
        # a test batch's mini-batch of 4 is one sequence on each of four ranks
        return [*found, "train.micro_batch_size=1"] if spec.phase == "testtime" else found

    def _size(self, spec: Run) -> tuple[str, ...]:
        if not self.setting.tiny:
            return ()
        return (f"model={self.model.rsplit('_', 1)[0]}_tiny", *self.setting.size)

    def scored(self, run: str, kind: str) -> Iterator[Job]:
        """Yield the evaluations of a run. A test-time run has answered already, a figure reads the training itself."""
        if _phase(run) == "testtime" or kind == "steps":
            return
        if kind == "niah":
            lengths = self.setting.niah
            tasks = tuple(dict.fromkeys(c.labels[0].partition("@")[0] for c in ITEMS["tab3"].columns))
            labels = tuple(f"{task}@{length}" for task in tasks for length in lengths.values())
            more = ["--essays", self.setting.essays] if self.setting.essays else []
            yield self._evaluation(run, "", kind, tasks, labels, [*_lengths(*lengths.values()), *more])
        elif kind == "longbench":
            yield self._evaluation(run, "", kind, ("longbench12",), LONGBENCH, ["--data", self.setting.longbench])
        elif kind == "ruler_qa":
            for task in _RULER_QA:
                for length, used in self.setting.qa.items():
                    part, file = f"{task}@{length}", self.setting.qa_file(self.model, task, length, "test")
                    more = [*_lengths(used), "--data", str(file)]
                    yield self._evaluation(run, part, f"{task}_{length}", (task,), (f"{task}@{used}",), more)
        else:
            yield self._other(run, kind)

    def evaluated(self, run: str, name: str) -> Path:
        """Return the folder of an evaluation."""
        return self.folder / "scores" / run / name

    def _evaluation(
        self, run: str, part: str, name: str, tasks: tuple[str, ...], labels: tuple[str, ...], more: list[str]
    ) -> Job:
        setting, out = self.setting, self.evaluated(run, name)
        weights = self.weights(run, part if _phase(run) == "posttrain" else "")
        words = ["evaluate", weights, "--tasks", ",".join(tasks), *more, *self._model_options(run)]
        words += ["--examples", str(setting.examples)] if setting.examples else []
        words += ["--out", str(out)]
        return Job(self._relative(out), tuple(words), out / SCORES, setting.ranks, labels=labels, reads=weights)

    def _model_options(self, run: str) -> list[str]:
        given = dict(word.split("=", 1) for word in self.setting.overrides)
        tp = ["--tp", given["parallel.tp"]] if given.get("parallel.tp", "1") != "1" else []
        named = run == START and self.setting.start and self.setting.tokenizer
        return tp + (["--tokenizer", self.setting.tokenizer] if named else [])

    def _other(self, run: str, kind: str) -> Job:
        setting, out = self.setting, self.evaluated(run, "lm_eval.json" if kind == "short" else "entropy.svg")
        if kind == "entropy":
            words = ["entropy", self.weights(run), "--text", setting.text, *self._model_options(run)]
            return Job(self._relative(out), (*words, "--out", str(out)), out, reads=self.weights(run))
        labels = {label.split()[0] for column in ITEMS["tabe1"].columns for label in self.short(column.labels)}
        words = ["lm-eval", self.weights(run), "--tasks", ",".join(sorted(labels)), *self._model_options(run)]
        words += ["--include-path", setting.tasks] if setting.tasks else []
        words += ["--limit", str(setting.examples)] if setting.examples else []
        return Job(self._relative(out), (*words, "--out", str(out)), out, setting.ranks, reads=self.weights(run))

    def short(self, labels: tuple[str, ...]) -> list[str]:
        """Return the tasks and metrics of lm-evaluation-harness in the place of the paper's."""
        known = self.setting.short
        return [known[label] for label in labels if label in known] if self.setting.tiny else list(labels)

    def _relative(self, path: Path) -> str:
        return str(path.relative_to(self.setting.out))


@cache
def _loaded(files: tuple[str, ...], overrides: tuple[str, ...]) -> Config:
    return load([*files], [*overrides], FAMILIES)


@cache
def _phase(run: str) -> str:
    return RUNS[run].phase if run in RUNS else "midtrain"


def _configured(files: list[str]) -> list[str]:
    return [word for file in files for word in ("--config", file)]


def _lengths(*lengths: int) -> list[str]:
    return ["--lengths", ",".join(map(str, lengths))]
