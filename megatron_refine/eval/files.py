"""The files of tasks that are not generated, found in a folder: by their names, or else by what they hold."""

import re
from collections.abc import Callable
from pathlib import Path

from megatron_refine.config import ConfigError
from megatron_refine.data.corpus import find_files
from megatron_refine.data.examples import Columns, Example, read_examples
from megatron_refine.data.formats import named, shown
from megatron_refine.data.readers import read_rows
from megatron_refine.eval.ruler import qa
from megatron_refine.eval.tasks import Task

Say = Callable[[str], None]
_POOLS = {name for name, _ in qa.FILES.values()}  # hotpotqa.json is no file of the task hotpotqa


def read(
    task: Task, folder: str, key: str, length: int | None = None, family: str = "", say: Say = lambda _: None
) -> list[Example]:  # fmt: skip
    """All examples of the task's file, see `find`. Raises ConfigError also where a row belongs to another task."""
    path = find(task, folder, key, length, family, say)
    examples = read_examples([str(path)], Columns(), key, task=task.name, max_new_tokens=task.max_new_tokens)
    for number, example in enumerate(examples, 1):
        if example.task != task.name:
            raise ConfigError(
                f"{key}: {path}: row {number} belongs to {example.task}, not to {task.name}; rename the file"
            )
    return examples


def find(
    task: Task, folder: str, key: str, length: int | None = None, family: str = "", say: Say = lambda _: None
) -> Path:  # fmt: skip
    """The one table below `folder` with examples of the task, at `length` if that is given.

    Names are those of the REFINE paper's files, qasper_16384.parquet or ruler_squadqa_MODEL_4096_200_test.parquet,
    or a task's name alone; a file named for training is never taken. If no name fits, the first row of every table is
    asked, its columns `task` and `max_seq_length`. Of several files that fit, made for several models, the one whose
    name has the model's `family` is taken, and `say` is told. Raises ConfigError where no file fits, or several do.
    """
    tables = [path for _, path in find_files([folder], key).files if named(path)[1].is_table]
    tables = [path for path in tables if not named(path)[0].endswith("_train") and path.name not in _POOLS]
    found = [path for path in tables if _named(task, named(path)[0], length)]
    found = found or [path for path in tables if _holds(task, path, key, length)]
    what = task.name if length is None else f"{task.name} at length {length}"
    if not found:
        raise ConfigError(
            f"{key}: {folder}: no file of {what} among {len(tables)} .jsonl and .parquet files; it is known by its "
            f"name ({task.name}{'_4096_200_test' if task.sized else '_16384'}.parquet) or its column task"
        )
    own = [path for path in found if _made_for(task, path, family)] if len(found) > 1 else []
    if len(own) == 1:
        say(f"{key}: {what}: {shown(own[0])}, made for {family}, is taken of {len(found)} files")
        return own[0]
    if len(found) > 1:
        names = ", ".join(map(shown, found))
        raise ConfigError(f"{key}: {folder}: {len(found)} files of {what}: {names}; name a folder with one of them")
    return found[0]


def _named(task: Task, stem: str, length: int | None) -> bool:
    found = _parts(task, stem)
    return found is not None and (length is None or found["length"] == str(length))


def _parts(task: Task, stem: str) -> re.Match[str] | None:
    """A file's name in parts: the model that it was made for, where it was for one, and its length."""
    model = r"(_(?P<model>[a-z][a-z0-9_]*?))?" if task.sized else ""
    return re.fullmatch(rf"{re.escape(task.name)}({model}_(?P<length>\d{{2,}})(_\d+)?(_test)?)?", stem)


def _made_for(task: Task, path: Path, family: str) -> bool:
    """Whether its name has this family, perhaps with more behind it, but nothing of a longer family before it."""
    found = _parts(task, named(path)[0]) if task.sized and family else None
    return found is not None and f"{found['model']}_".startswith(f"{family}_")


def _holds(task: Task, path: Path, key: str, length: int | None) -> bool:
    try:
        row = next(read_rows(path, key), {})
    except ConfigError:
        if named(path)[1].kind != "json":  # which may hold anything: nobody said that this one is a task's
            raise
        return False
    return row.get("task") == task.name and (length is None or row.get("max_seq_length") == length)
