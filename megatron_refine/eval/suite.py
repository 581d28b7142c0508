"""Tasks as examples, their answers as scores: what evaluations in a run, test-time training and evaluate.py share."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_refine.config import Config, ConfigError
from megatron_refine.data.examples import Columns, Example, read_examples
from megatron_refine.eval import files, ruler, tasks
from megatron_refine.eval.answers import Answerer, Question
from megatron_refine.progress import counted


@dataclass(frozen=True)
class Prediction:
    """An answer and what it is worth."""

    task: str
    index: int
    prediction: str
    references: tuple[str, ...]
    score: float  # in [0, 1]


@dataclass(frozen=True)
class Part:
    """Examples whose scores are averaged."""

    task: str
    length: int | None  # context length where the task has several
    examples: list[Example]
    note: str = ""  # what a reader of the score must know of the examples

    @property
    def label(self) -> str:
        return self.task if self.length is None else f"{self.task}@{self.length}"


@dataclass(frozen=True)
class Score:
    """Mean of n scores in [0, 1], and its standard error; 0 of one score."""

    mean: float
    error: float
    n: int

    @classmethod
    def of(cls, scores: Sequence[float]) -> "Score":
        n, mean = len(scores), sum(scores) / len(scores)
        variance = sum((s - mean) ** 2 for s in scores) / (n - 1) if n > 1 else 0.0
        return cls(mean, math.sqrt(variance / n), n)

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ± {100 * self.error:.1f}"


@dataclass(frozen=True)
class Request:
    """Tasks that are wanted. `option` makes of a field's name how the user writes it, in errors."""

    tasks: Sequence[str]  # names of tasks and groups
    lengths: Sequence[int]  # of tasks that come at several
    examples: int  # of a generated task at a length
    rows: int | None  # most of a file; None: all
    seed: int
    data: str = ""  # folder of the tasks' files
    essays: str = ""  # file or folder of the haystacks' prose
    family: str = ""  # the model's, which files may be made for
    option: Callable[[str], str] = "--{}".format
    say: Callable[[str], None] = lambda _: None  # told which file is taken, where several fit


def collect(request: Request, count_tokens: Callable[[str], int], progress: bool = False) -> list[Part]:
    """All examples of the tasks, a part a task and length. Raises ConfigError for what cannot be found or made."""
    r, key = request, request.option("data")
    wanted = tasks.expand(r.tasks, r.option("tasks"))
    if reading := [task.name for task in wanted if task.source == "files"]:
        if not r.data:
            raise ConfigError(f"{key}: names no folder; {reading[0]} is read from a file, name the folder that has it")
    if not r.lengths and any(task.sized for task in wanted):
        raise ConfigError(f"{r.option('lengths')}: names no length; name one in tokens, 4096")
    parts: list[Part] = []
    for task in wanted:
        for length in sorted(set(r.lengths)) if task.sized else (None,):
            if task.source == "files":
                parts.append(Part(task.name, length, files.read(task, r.data, key, length, r.family, r.say)[: r.rows]))
            else:
                assert length is not None
                parts.append(_generated(task, length, request, count_tokens, progress))
    return parts


def _generated(
    task: tasks.Task, length: int, r: Request, count_tokens: Callable[[str], int], progress: bool
) -> Part:  # fmt: skip
    made = ruler.generate(task.name, length, range(r.examples), r.seed, count_tokens, essays=r.essays, data=r.data)
    shown = counted(made, f"making {task.name}@{length}", r.examples, "prompts", show=progress)
    return Part(task.name, length, list(shown), ruler.haystack_of(task.name, r.essays))


def questions(examples: Sequence[Example]) -> list[Question]:
    """What the model is asked."""
    return [Question(e.prompt, e.max_new_tokens, tasks.of(e.task).stops) for e in examples]


def predictions(examples: Sequence[Example], texts: Sequence[str]) -> list[Prediction]:
    """Answers, scored as their task is."""
    return [
        Prediction(e.task, e.index, text, e.references, tasks.of(e.task).score(text, e.references))
        for e, text in zip(examples, texts, strict=True)
    ]


def answers(part: Part, answerer: Answerer, skip: frozenset[int] = frozenset()) -> Iterator[dict[int, Prediction]]:
    """Predictions by place in the part, a batch of all replicas at a time; not of the places in `skip`."""
    places = [place for place in range(len(part.examples)) if place not in skip]
    left = [part.examples[place] for place in places]
    asked = questions(left)
    for found in answerer(asked, answerer.encode(asked)):
        numbers = sorted(found)
        scored = predictions([left[i] for i in numbers], [found[i] for i in numbers])
        yield {places[i]: prediction for i, prediction in zip(numbers, scored, strict=True)}


class TaskEvaluation:
    """The tasks that a run evaluates on its way."""

    def __init__(
        self, config: Config, answerer: Answerer, count_tokens: Callable[[str], int],
        say: Callable[[str], None] = lambda _: None,
    ):  # fmt: skip
        """`say` is told which of several files is taken. Raises ConfigError for what cannot be found or made."""
        e, t = config.eval, config.task
        self.answerer = answerer
        wanted = Request(
            e.tasks, e.lengths, e.examples, e.examples, config.run.seed, e.data, e.essays, config.model.family,
            "eval.{}".format, say,
        )  # fmt: skip
        self.parts = collect(wanted, count_tokens)
        if t.valid_paths:
            columns = Columns(t.prompt_column, t.answer_column)
            found = read_examples(t.valid_paths, columns, "task.valid_paths", max_new_tokens=t.max_new_tokens)
            self.parts.append(Part("valid", None, found[: e.examples]))

    def __call__(self) -> dict[str, Score]:
        """Scores by label, on all ranks."""
        return {part.label: Score.of([p.score for p in self._predictions(part)]) for part in self.parts}

    def _predictions(self, part: Part) -> Iterator[Prediction]:
        for found in answers(part, self.answerer):
            yield from found.values()


def score_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line a task of predictions as rows, scored as today: mean and standard error in percent, and n."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        scores.setdefault(row["task"], []).append(tasks.of(row["task"]).score(row["prediction"], row["references"]))
    width = max((len(task) for task in scores), default=0)
    return "\n".join(f"{task:<{width}}  {Score.of(found)}  (n {len(found)})" for task, found in scores.items())
