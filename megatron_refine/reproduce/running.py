"""The commands of a reproduction, printed for a shell, run one after the other, or handed to SLURM."""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from megatron_refine.checkpoint.manifest import last_step
from megatron_refine.checkpoint.source import CHECKPOINTS
from megatron_refine.config import ConfigError
from megatron_refine.files import read_json, write_json
from megatron_refine.reproduce.chain import Chain, Job
from megatron_refine.reproduce.setting import Setting

Call = Callable[[Sequence[str], int], int]  # words of a command, its ranks -> exit code
WIDTH = 110
MADE = "commands.json"  # beside the pages: by name of a job, the words that it was started with
_WEIGHTS = "weights="  # of a run, by the digest of its checkpoint
_ANY = ("--ranks", "--tp", "parallel.")  # of what changes no result


def listed(setting: Setting, items: Iterable[str], models: Iterable[str]) -> list[Job]:
    """Return all commands of the items, each once, in an order in which they can run. Raises ConfigError."""
    found: dict[str, Job] = {}
    for item in items:
        for model in models:
            for job in Chain(setting, model).jobs(item):
                found.setdefault(job.name, job)
    return list(found.values())


def argv(words: Sequence[str], ranks: int) -> list[str]:
    """Return the program and its arguments, as a user types them. `train` starts its own ranks."""
    if ranks > 1 and words[0] not in ("train", "submit"):
        return ["torchrun", "--nproc-per-node", str(ranks), "-m", "megatron_refine", *words]
    return ["megatron-refine", *words]


def shell(words: Sequence[str], ranks: int = 1) -> str:
    """Return a command as lines of a shell."""
    lines = [""]
    for word in map(shlex.quote, argv(words, ranks)):
        if lines[-1] and len(lines[-1]) + len(word) > WIDTH:
            lines.append(" ")
        lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n".join(lines)


def spawn(words: Sequence[str], ranks: int) -> int:
    """Run a command in processes of its own. Return its exit code."""
    program, *rest = argv(words, ranks)
    module = "megatron_refine" if program == "megatron-refine" else "torch.distributed.run"
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    return subprocess.run([sys.executable, "-m", module, *rest], env=environment, stdin=subprocess.DEVNULL).returncode


def printed(setting: Setting, jobs: Sequence[Job]) -> str:
    """Return what is left to do as a script."""
    parts = []
    for job in jobs:
        if job.done:
            parts.append(f"# {job.name}: done")
        elif setting.nodes and job.config is not None:
            parts.append(f"# {job.name}\n{shell(submission(setting, job))}")
        else:
            made = f"mkdir -p {shlex.quote(str(job.result.parent))}\n" if job.words[0] == "entropy" else ""
            parts.append(f"# {job.name}\n{made}{shell(job.words, job.ranks)}")
    left = [job for job in jobs if not job.done]
    trainings = sum(job.config is not None for job in left)
    parts.append(f"# {trainings} trainings and {len(left) - trainings} other commands are left of {len(jobs)}")
    return "\n".join(parts)


def check_made(out: Path, jobs: Iterable[Job]) -> None:
    """Raise ConfigError, a line a job, where what is done was made by another command than today's, or of weights that
    were replaced since.

    Packed rows know what they are of; what was started by hand is taken for right.
    """
    made, problems = _made(out), []
    for job in jobs:
        noted = _noted(job)
        before, now = _said(made.get(job.name, noted)), _said(noted)
        if not any(word.startswith(_WEIGHTS) for word in before):  # not known
            now = _said(job.words)
        if not job.done:  # of a training that has begun the weights count: the rest may change, and is told
            before, now = ([word for word in words if word.startswith(_WEIGHTS)] for words in (before, now))
        begun = job.done or (job.config is not None and last_step(job.result / CHECKPOINTS) >= 0)
        if before != now and job.words[0] != "prepare" and begun:
            pairs = ((before, now), (now, before))
            old, new = (" ".join(word for word in one if word not in other) or "less" for one, other in pairs)
            problems.append(f"{job.name}: was made with {old}, now {new}; name another --out, or remove {job.result}")
    if problems:
        raise ConfigError("\n".join(problems))


def _made(out: Path) -> dict[str, list[str]]:
    path = out / MADE
    return dict(read_json(path)) if path.exists() else {}


def _note(out: Path, job: Job) -> None:
    """Write down what a job is started with."""
    write_json(out / MADE, _made(out) | {job.name: _noted(job)})


def _noted(job: Job) -> list[str]:
    return [*job.words, *([_WEIGHTS + job.source] if job.source else [])]


def _said(words: Sequence[str]) -> list[str]:
    """Return the words that a result depends on."""
    pairs = zip(["", *words], words, strict=False)
    return [word for before, word in pairs if not word.startswith(_ANY) and before not in _ANY]


def run_here(out: Path, jobs: Sequence[Job], call: Call, say: Callable[[str], None]) -> int:
    """Run what is not done, one after the other. Return 0, or the exit code of the one that failed, which ends it."""
    for number, job in enumerate(jobs, 1):
        where = f"[{number}/{len(jobs)}] {job.name}"
        if job.done:
            say(f"{where}: done before")
            continue
        say(f"{where}: {job.words[0]}")
        job.result.parent.mkdir(parents=True, exist_ok=True)  # a picture's folder must be there
        _note(out, job)
        if code := call(job.words, job.ranks):
            say(f"{where}: ended with code {code}; the same command goes on here:\n{shell(job.words, job.ranks)}")
            return code
    return 0


def submission(setting: Setting, job: Job) -> list[str]:
    """Return the words of `submit` for a training, on as many nodes as its mini-batch feeds. Raises ConfigError."""
    assert job.config is not None
    each = setting.node_ranks
    nodes, ranks = (job.ranks // each, each) if job.ranks % each == 0 else (1, job.ranks)
    if ranks > each:
        raise ConfigError(f"{job.name}: takes {ranks} ranks, which are no multiple of a node's {each}; change --nodes")
    start = 3 if job.words[1] == "--ranks" else 1
    files = [word for word in job.words[start:] if word != "--config"]
    smaller = [] if ranks == each else ["--gpus-per-node", str(ranks)]
    options = ["--nodes", str(nodes), *smaller, *(["--site", setting.site] if setting.site else [])]
    return ["submit", *files[:2], *options, *files[2:]]


def submit_all(setting: Setting, jobs: Sequence[Job], call: Call, say: Callable[[str], None]) -> int:
    """Submit each training whose weights are there, once. Return 0, or the exit code of `submit` that refused one."""
    waiting = 0
    trainings = {str(job.result): job for job in jobs if job.config is not None}
    for job in trainings.values():
        assert job.config is not None
        before = trainings.get(job.config.checkpoint.load)
        if job.done:
            continue
        if any((job.result / "logs").glob("*.sbatch")):
            say(f"{job.name}: submitted before; remove {job.result / 'logs'}/*.sbatch to submit it again")
        elif before and not before.done:
            waiting += 1
        elif code := call(submission(setting, job), 1):
            return code
        else:
            _note(setting.out, job)
    left = sum(job.config is None and not job.done for job in jobs)
    say(f"{waiting} trainings wait for others: run this again when those are done. {left} other commands are left: "
        "without --nodes they run here, or are printed")  # fmt: skip
    return 0
