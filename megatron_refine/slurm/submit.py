"""Hand a job, or a chain of jobs, to sbatch."""

import subprocess
import time
from dataclasses import replace
from pathlib import Path

from megatron_refine.config import ConfigError
from megatron_refine.files import write
from megatron_refine.slurm.job import Job


def submit(job: Job, links: int = 1) -> list[str]:
    """Submit a job, or a chain of `links` jobs, and return their ids.

    Each job of a chain begins when the one before it has ended, however it ended.

    The script is kept in the run's folder. Raises ConfigError where sbatch refuses or is not there.
    """
    if links > 1:  # the next link goes on where one stops; the last may come back
        scripts = [replace(job, requeues=i == links - 1).script() for i in range(links)]
    else:
        scripts = [job.script()]
    logs = job.run_dir / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.dir={job.run_dir}: cannot be written: {error.strerror}; name another folder") from None
    ids: list[str] = []
    for link, script in enumerate(scripts):
        path = logs / f"{time.strftime('%Y%m%d-%H%M%S')}-{link}.sbatch"
        write(path, script)
        ids.append(_sbatch(path, [f"--dependency=afterany:{ids[-1]}"] if ids else []))
    return ids


def _sbatch(script: Path, options: list[str]) -> str:
    try:
        done = subprocess.run(["sbatch", "--parsable", *options, str(script)], capture_output=True, encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError("sbatch: not found; submit from a login node, or look at it with --dry-run") from None
    if done.returncode:
        said = " ".join(done.stderr.split())
        raise ConfigError(f"{script}: refused by sbatch: {said}; correct the site file or the options")
    return done.stdout.strip().split(";")[0]
