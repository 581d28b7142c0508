"""The script of one job. What it does is bash, in job.sh; this fills in its head."""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_refine.config import Config, ConfigError
from megatron_refine.slurm.site import Site

ROOT = Path(__file__).parents[2]
BODY = Path(__file__).with_name("job.sh")
ENGINE_PORT = 30000


@dataclass(frozen=True)
class Job:
    """A run, or with `points` a sweep of runs as one array."""

    name: str
    config: Config
    arguments: list[str]  # of the training command: --config FILE ..., overrides
    nodes: int
    site: Site
    engine_nodes: int = 0
    points: Sequence[Sequence[str]] = field(default_factory=list)  # overrides, an absolute run.dir among them
    at_once: int = 0  # runs of the sweep; 0: all
    requeues: bool = True
    runs: Sequence[Config] = ()  # the configuration of each

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run.dir).absolute()

    def check(self) -> None:
        """Raise ConfigError where nodes and engine do not fit together, and for a name that sbatch cannot take."""
        engine = self.config.engine
        if self.engine_nodes and engine.kind != "sglang":
            raise ConfigError(f"--engine-nodes={self.engine_nodes}: engine.kind is {engine.kind}; set it to sglang")
        if self.engine_nodes and engine.urls:
            raise ConfigError("--engine-nodes: engine.urls names servers that run already; leave out one of the two")
        if self.engine_nodes and not engine.python:
            raise ConfigError("--engine-nodes: engine.python is missing; set it to the interpreter that has SGLang")
        if self.engine_nodes and engine.offload:
            raise ConfigError("--engine-nodes: the servers have GPUs of their own; leave out engine.offload")
        for text in (f"run.dir={self.run_dir}", f"--name={self.name}", *map(_folder, self.points)):
            if re.search(r"[\\\n\r]", text):
                raise ConfigError(f"{text!r}: a job cannot have a backslash or a new line in it; choose another")

    def script(self) -> str:
        return "\n".join([*self._options(), "", *self._settings(), "", BODY.read_text(encoding="utf-8")])

    def _options(self) -> list[str]:
        """Return the lines that sbatch reads."""
        site, log = self.site, f"{self.run_dir}/logs".replace("%", "%%")  # where %j is the job's id
        options = [
            f"--job-name={self.name}", f"--nodes={self.nodes + self.engine_nodes}",
            f"--ntasks-per-node={site.ranks_per_node}",
        ]  # fmt: skip
        options += [f"--gpus-per-node={site.gpus_per_node}"] if site.gpus_per_node else []
        options += [f"--cpus-per-task={site.cpus_per_rank}"] if site.cpus_per_rank else []
        options += [
            f"--{key}={value}" for key in ("account", "partition", "qos", "time") if (value := getattr(site, key))
        ]
        if self.points:
            limit = f"%{self.at_once}" if self.at_once else ""
            options.append(f"--array=0-{len(self.points) - 1}{limit}")
        options += [
            f"--output={log}/slurm-{'%A_%a' if self.points else '%j'}.out", "--open-mode=append", "--requeue",
            f"--signal=B:USR1@{site.signal_seconds}",
        ]  # fmt: skip
        return ["#!/bin/bash", *(f"#SBATCH {option}" for option in [*map(_quoted, options), *site.sbatch])]

    def _settings(self) -> list[str]:
        """Return the variables that the body reads."""
        site, python = self.site, self.site.python or sys.executable
        if "/" in python:
            python = str(ROOT / python)
        srun = [*site.srun, *([f"--container-image={site.container}"] if site.container else [])]
        srun += [f"--container-mounts={','.join(site.mounts)}"] if site.mounts else []
        train = [*site.prefix, python, "-m", "megatron_refine", "train", *self.arguments]
        serve = [*site.prefix, python, "-m", "megatron_refine", "serve", "--port", str(ENGINE_PORT), *self.arguments]
        lines = [
            f"cd {shlex.quote(os.getcwd())} || exit 1",
            *(
                f"export {name}={shlex.quote(value)}"
                for name, value in {"OMP_NUM_THREADS": "1", **site.environment}.items()
            ),
            *(f"module load {shlex.quote(name)}" for name in site.modules),
            *site.prologue.splitlines(),
            f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}",
            f"train_nodes={self.nodes} ranks_per_node={site.ranks_per_node}",
            f"engine_nodes={self.engine_nodes} engine_port={ENGINE_PORT}",
            f"retries={site.retries} requeues={'yes' if self.requeues else 'no'}",
            f"srun_options=({shlex.join(srun)})",
            f"run_dir={shlex.quote(str(self.run_dir))}",
            f"train=({shlex.join(train)})",
            f"serve=({shlex.join(serve)})",
        ]
        return [*lines, *self._sweep()]

    def _sweep(self) -> list[str]:
        if not self.points:
            return []
        cases = []
        for i, point in enumerate(self.points):
            cases.append(f"{i}) run_dir={shlex.quote(_folder(point))} point=({shlex.join(point)}) ;;")
        return ['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac", 'train+=("${point[@]}") serve+=("${point[@]}")']


def _folder(point: Sequence[str]) -> str:
    return next(value for value in point if value.startswith("run.dir=")).removeprefix("run.dir=")


def _quoted(option: str) -> str:
    """Quote an option for sbatch, to which a backslash makes the next character plain, in quotes too."""
    if re.fullmatch(r"[\w@%+=:,./-]*", option, re.ASCII):
        return option
    return '"' + re.sub(r'(["\\])', r"\\\1", option) + '"'
