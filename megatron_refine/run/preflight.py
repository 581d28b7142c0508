"""What can be known before ranks start: asked of a run's files, tokenizer, model, folders, tasks and services.

Imports neither torch nor Megatron, but for hooks of the user's own. Nothing is written, trained or downloaded.
"""

import contextlib
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from megatron_refine import extras
from megatron_refine.checkpoint.manifest import complete_folders, last_step
from megatron_refine.checkpoint.resumption import Past, past_of_checkpoint, past_of_run, refuse
from megatron_refine.checkpoint.source import CHECKPOINTS, differences, find
from megatron_refine.config import Config, ConfigError
from megatron_refine.data.corpus import find_corpus
from megatron_refine.data.examples import Columns, read_examples
from megatron_refine.data.readers import read_documents
from megatron_refine.data.tokenizer import bos_id, check_vocabulary, find_tokenizer, load_tokenizer
from megatron_refine.errors import CheckpointError
from megatron_refine.estimate.flops import total_steps
from megatron_refine.eval import files as task_files
from megatron_refine.eval import tasks
from megatron_refine.eval.ruler import NIAH, qa
from megatron_refine.files import TornError
from megatron_refine.models import cost, family
from megatron_refine.phases.tokenizer import with_tokenizer
from megatron_refine.report import metrics, tracking
from megatron_refine.report.folder import read_progress
from megatron_refine.report.summary import is_evaluation

FILES = 256  # files of a corpus whose first row is read
SECONDS = 20  # until an interpreter that does not answer is left to the start of the run
_BYTES = {"fp32": 4, "bf16": 2}


def check(config: Config, in_image: bool = False) -> None:
    """Raise ConfigError, a line a problem, for what would end a run of this configuration at its start.

    Raises CheckpointError where nothing but the model to start from or the disk is wrong: damaged, or full. in_image:
    the run is to be in one, where the interpreter of its servers is.
    """
    found = list[Exception]()
    own = (_run, _room, _data, _tokenizer, _model, _hooks, _tasks)
    questions = (extras.check_optimizer, *own, tracking.check, *(() if in_image else (engine,)))
    for question in questions:
        try:
            question(config)
        except (ConfigError, CheckpointError) as error:
            found.append(error)
    if found:
        kind = ConfigError if any(isinstance(error, ConfigError) for error in found) else CheckpointError
        raise kind("\n".join(dict.fromkeys("\n".join(map(str, found)).splitlines())))


def warnings(config: Config, nodes: int) -> list[str]:
    """Return what is likely not meant, a line each."""
    if nodes > 1 and config.train.phase == "midtrain" and not config.data.paths and not config.checkpoint.load:
        if past_of(config) is None:
            return [
                f"{nodes} nodes would train from scratch on the sources of Python's standard library: name your text "
                "with data.paths, and a model to start from with checkpoint.load"
            ]
    return []


def past_of(config: Config) -> Past | None:
    """Return what the run in run.dir was configured as where it stands; None of a new one, or one without a checkpoint,
    which begins anew. Raises ConfigError where config.yaml is none."""
    run = Path(config.run.dir)
    found = complete_folders(run / CHECKPOINTS)
    if found:
        with contextlib.suppress(CheckpointError):  # a damaged one is told when it is loaded
            return past_of_checkpoint(found[-1])
    try:
        progress = read_progress(run)
    except TornError as error:
        raise CheckpointError(str(error)) from None
    return past_of_run(run) if progress and progress["step"] else None


def _run(config: Config) -> None:
    """Whether the folders can be written, and the run goes on as what it was."""
    _baseline(config.run.baseline)
    _existing("run.dir", config.run.dir)
    for name in (CHECKPOINTS, "logs"):
        path = Path(config.run.dir, name)
        if os.path.lexists(path) and not path.is_dir():
            raise ConfigError(f"{path}: is no folder, or a link to one that is not there; mount it, or remove the link")
    _existing("data.cache_dir", config.data.cache_dir)
    if past := past_of(config):
        refuse(past, config)
    steps = 0 if config.train.phase == "testtime" else _done(config)
    if steps > total_steps(config):
        raise ConfigError(f"train.steps={config.train.steps}: the run has {steps} already; set {steps} or more")


def _room(config: Config) -> None:
    """Whether the disk has room for a checkpoint. Raises CheckpointError."""
    weights = cost.parameters(config.model)
    needed = 0 if config.resets else weights * (_BYTES[config.train.precision] + 12)  # in fp32 also Adam's moments
    free = shutil.disk_usage(_existing("run.dir", config.run.dir)).free
    if free < needed:
        raise CheckpointError(
            f"run.dir={config.run.dir}: disk full: a checkpoint takes {needed / 2**20:.0f} MiB, {free / 2**20:.0f} MiB "
            "are free; make room, or name a folder on another disk"
        )


def _baseline(run: str) -> None:
    """Whether the run to compare with has an evaluation."""
    try:
        evaluated = not run or any(map(is_evaluation, metrics.read(Path(run) / metrics.METRICS)))
    except (OSError, TornError) as error:
        raise ConfigError(f"run.baseline={run}: {error}") from None
    if not evaluated:
        raise ConfigError(f"run.baseline={run}: no evaluation in {metrics.METRICS}; name the run.dir of a finished run")


def _done(config: Config) -> int:
    """Steps that the newest checkpoint of the run holds; 0 without one."""
    return max(0, last_step(Path(config.run.dir) / CHECKPOINTS))


def _existing(key: str, folder: str) -> Path:
    """The folder, or the one above it in which it is to be made. Raises ConfigError where that cannot be written."""
    path = next(p for p in (Path(folder).absolute(), *Path(folder).absolute().parents) if os.path.lexists(p))
    reason = "is no folder" if not path.is_dir() else "" if os.access(path, os.W_OK | os.X_OK) else "cannot be written"
    if reason:
        raise ConfigError(f"{key}={folder}: {path} {reason}; name another folder")
    return path


def _data(config: Config) -> None:
    """The first row of each file of documents, and every row of the prompts, which are few."""
    data, task = config.data, config.task
    if config.train.phase == "midtrain" or data.paths:
        for key, paths in (("data.paths", data.paths), ("data.valid_paths", data.valid_paths)):
            for rows in _tables(paths, data.text_column, key):
                next(rows, None)
    if config.train.phase != "midtrain":
        if not task.paths:
            phase = config.train.phase
            raise ConfigError(f"task.paths: train.phase={phase} trains on prompts; name .jsonl or .parquet files")
        read_examples(task.paths, Columns(task.prompt_column, task.answer_column), "task.paths")


def _tables(paths: list[str], column: str, key: str) -> Iterator[Iterator[str]]:
    corpus = find_corpus(paths, column, key) if paths else None
    for (_, path), form in list(zip(corpus.files, corpus.forms, strict=True))[:FILES] if corpus else ():
        if form.is_table:
            yield read_documents(path, column, key, form)


def _tokenizer(config: Config) -> None:
    """Whether it is there, fits the vocabulary, and has the tokens that the configuration asks for."""
    data, phase = with_tokenizer(config).data, config.train.phase
    if not data.tokenizer:
        if phase != "midtrain":
            raise ConfigError(f"data.tokenizer: train.phase={phase} needs that of its model; name a run or a file")
        return check_vocabulary(config.model.vocab_size)
    path = find_tokenizer(Path(data.tokenizer), "data.tokenizer")
    tokenizer = load_tokenizer(path, config.model.vocab_size, "data.tokenizer")
    if data.add_bos:
        bos_id(tokenizer, path)


def _model(config: Config) -> None:
    """Whether the model that the run goes on from, or starts from, is that of the configuration."""
    steps = [] if config.resets else complete_folders(Path(config.run.dir) / CHECKPOINTS)
    if steps:
        with contextlib.suppress(CheckpointError):  # a damaged one is told, or passed over, when it is loaded
            if found := differences(find(steps[-1]), config.model):
                raise ConfigError(
                    f"run.dir={config.run.dir}: has another model; set {' '.join(found)}, or choose a new run.dir"
                )
    elif config.checkpoint.load:
        source = find(Path(config.checkpoint.load), "checkpoint.load")
        if found := differences(source, config.model):
            raise ConfigError(f"checkpoint.load={config.checkpoint.load}: is another model; set {' '.join(found)}")


def _hooks(config: Config) -> None:
    if ":" in config.refine.reward + config.refine.selection + config.eval.selection:
        from megatron_refine.step.hooks import check_hooks  # with torch, on whose tensors they are tried

        check_hooks(config)


def _tasks(config: Config) -> None:
    """Whether the tasks of evaluations exist and have their files."""
    e = config.eval
    wanted = tasks.expand(e.tasks, "eval.tasks")
    if not e.lengths and any(task.sized for task in wanted):
        raise ConfigError("eval.lengths: names no length; name one in tokens, 4096")
    if e.essays and any(task.name in NIAH and NIAH[task.name].haystack == "essay" for task in wanted):
        find_corpus([e.essays], "text", "eval.essays")
    for task in wanted:
        if task.name in qa.FILES:
            qa.read_pool(task.name, e.data)
        if task.source == "files":
            if not e.data:
                raise ConfigError(f"eval.data: names no folder; {task.name} is read from a file, name its folder")
            for length in e.lengths if task.sized else (None,):
                task_files.find(task, e.data, "eval.data", length, config.model.family)
    if config.task.valid_paths:
        columns = Columns(config.task.prompt_column, config.task.answer_column)
        read_examples(config.task.valid_paths, columns, "task.valid_paths")


def engine(config: Config) -> None:
    """Raise ConfigError where the interpreter that servers are launched with has no SGLang, or they could not start."""
    python, words = config.engine.python, " ".join(config.engine.args).replace("=", " ").split()
    if config.engine.kind != "sglang" or not config.refine.enabled or not python:
        return
    if ("--attention-backend", "triton") in itertools.pairwise(words) and not cost.attending(config.model):
        what = "it needs layers of softmax attention, and the model has none; leave it out, or choose fa3"
        raise ConfigError(f"engine.args: --attention-backend triton: {what}")
    if "--enable-memory-saver" in words:
        what = "a server that gives its memory back has no weights until the next sync, and answers all the same"
        raise ConfigError(f"engine.args: --enable-memory-saver: {what}; leave it out")
    for i in cost.attending(config.model)[:1]:
        keys = family.layers(config.model)[i].settings.kv_heads
        if keys % config.engine.tp:
            raise ConfigError(f"engine.tp={config.engine.tp}: must divide the {keys} key heads; choose a divisor")
    program = shutil.which(python)
    if not program:
        what = "no such interpreter; install SGLang, or name another (docs/sglang.md)"
        raise ConfigError(f"engine.python={python}: {what}")
    line = [
        os.path.abspath(program),
        "-c",
        "import importlib.util, sys; sys.exit(3 if importlib.util.find_spec('sglang') is None else 0)",
    ]
    with contextlib.suppress(subprocess.TimeoutExpired):
        try:
            code = subprocess.run(line, capture_output=True, timeout=SECONDS, cwd="/").returncode
        except OSError as error:
            raise ConfigError(f"engine.python={python}: cannot be run: {error.strerror}; name an interpreter") from None
        if code:
            what = "has no SGLang; install it there" if code == 3 else f"ends with code {code}; mend it"
            raise ConfigError(f"engine.python={python}: {what}, or name another interpreter (docs/sglang.md)")
