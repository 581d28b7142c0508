"""The runs of a sweep: here, one after the other, or as SLURM jobs. A finished point is not run again."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_refine.checkpoint.manifest import last_step
from megatron_refine.checkpoint.source import CHECKPOINTS
from megatron_refine.config import ConfigError, absolute, absolute_file, load
from megatron_refine.files import TornError, write_json
from megatron_refine.models.family import FAMILIES
from megatron_refine.report import metrics
from megatron_refine.scaling.sweep import Point, Sweep
from megatron_refine.slurm.job import Job
from megatron_refine.slurm.site import Site
from megatron_refine.slurm.submit import submit

RECORD, LOG = "point.json", "point.log"
GRACE = 60.0  # seconds that a run has to save and end
TORCHRUN = re.compile(r"^[EW]\d{4} \S+ \d+ \S*torch/distributed", re.MULTILINE)  # its own lines follow the ranks'


def command(sweep: Sweep, point: Point) -> list[str]:
    """The training command on this machine."""
    files = [argument for file in sweep.config for argument in ("--config", file)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(point.ranks)]
    return [*torchrun, "-m", "megatron_refine", "train", *files, *point.overrides]


def finished(point: Point) -> bool:
    """Whether its last run, of this very configuration, came to its end."""
    last = record(point)
    return last.get("code") == 0 and last.get("overrides") == point.overrides and _known(last, point)


def _identity(point: Point) -> str:
    """Hash all that a point is, whichever file says it; but where its files stand."""
    tree = point.config.model_dump(serialize_as_any=True, exclude={"run"}) | {"seed": point.config.run.seed}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def _known(last: Mapping[str, Any], point: Point) -> bool:
    """Whether a record is of this configuration. Earlier versions wrote none, or a hash of the whole file."""
    whole = hashlib.sha256(point.config.to_yaml().encode()).hexdigest()[:16]
    return last.get("config") in (None, _identity(point), whole)


def check_same(points: Sequence[Point]) -> None:
    """Raise ConfigError, a line a point, where a folder has steps of another configuration: a run would go on from
    them, and they would be taken for the point's."""
    remedy = "choose a new out, or remove that folder"
    lines = [f"{point.folder}: has steps of another configuration of this point; {remedy}"
             for point in points if is_other(point)]  # fmt: skip
    if lines:
        raise ConfigError("\n".join(lines))


def is_other(point: Point) -> bool:
    """Whether the folder has steps of another configuration."""
    if _known(record(point), point):
        return False
    try:
        begun = any("train/loss" in row for row in metrics.read(point.folder / metrics.METRICS))
    except TornError as error:
        raise ConfigError(str(error)) from None
    return begun or last_step(point.folder / CHECKPOINTS) >= 0


def _begin(point: Point) -> None:
    """Write down what the folder's steps will be of."""
    point.folder.mkdir(parents=True, exist_ok=True)
    write_json(point.folder / RECORD, _entry(point))


def _entry(point: Point) -> dict[str, Any]:
    return {"overrides": point.overrides, "config": _identity(point)}


def record(point: Point) -> dict[str, Any]:
    """What is known of its last run: overrides, and a hash of its configuration; code, seconds and cause of one that
    has ended here. {} without one."""
    try:
        found: dict[str, Any] = json.loads((point.folder / RECORD).read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):
        return {}


def run_here(sweep: Sweep, points: Sequence[Point], say: Callable[[str], None]) -> None:
    """Every point that has not finished; one that fails does not stop the others. A signal ends the run that is under
    way, which saves, and this. Raises ConfigError as `check_same`."""
    check_same(points)
    for number, point in enumerate(points, 1):
        where = f"[{number}/{len(points)}] {point.name}"
        if finished(point):
            say(f"{where}: finished before")
            continue
        say(f"{where}: {point.ranks} rank{'s' * (point.ranks > 1)}, {point.folder / LOG}")
        _begin(point)
        start = time.monotonic()
        code, cause = _run(sweep, point)
        seconds = round(time.monotonic() - start, 1)
        write_json(point.folder / RECORD, _entry(point) | {"code": code, "seconds": seconds, "cause": cause})
        say(f"{where}: " + (f"{seconds:.0f} s" if code == 0 else f"FAILED with code {code}: {cause}"))


def _run(sweep: Sweep, point: Point) -> tuple[int, str]:
    log = point.folder / LOG
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    with log.open("w", encoding="utf-8") as file:
        run = subprocess.Popen(
            command(sweep, point), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            run.wait(60 * sweep.timeout_minutes)
        except subprocess.TimeoutExpired:
            _end(run)
            return 1, f"took longer than timeout_minutes={sweep.timeout_minutes:g}"
        except KeyboardInterrupt:
            _end(run)
            raise
    return failure(log.read_text(encoding="utf-8")) if run.returncode else (0, "")


def _end(run: subprocess.Popen[bytes]) -> None:
    """Have it save; then whatever is left of it ends."""
    os.killpg(run.pid, signal.SIGTERM)
    try:
        run.wait(GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()


def failure(text: str) -> tuple[int, str]:
    """The exit code of the rank that failed first, and the last line that a run said, from torchrun's output."""
    codes = re.findall(r"exitcode\s*:\s*(-?\d+)", text)
    said = [line.strip() for line in TORCHRUN.split(text)[0].splitlines() if line.strip()]
    errors = [line for line in said if "Error" in line]
    return int(codes[-1]) if codes else 1, (errors or said or ["it said nothing"])[-1][:300]


def submit_jobs(sweep: Sweep, points: Sequence[Point], site: Site, dry_run: bool) -> list[str]:
    """An array for each number of nodes. Returns the jobs' ids, or with dry_run their scripts. Raises ConfigError."""
    check_same(points)
    jobs = defaultdict[int, list[Point]](list)
    for point in points:
        if point.ranks % site.ranks_per_node:
            raise ConfigError(f"{point.name}: {point.ranks} ranks are no multiple of a node's {site.ranks_per_node}")
        if not finished(point):
            jobs[point.ranks // site.ranks_per_node].append(point)
    ids: list[str] = []
    for nodes, some in jobs.items():
        files = [x for file in sweep.config for x in ("--config", absolute_file(file))]
        config = load(sweep.config, [*sweep.overrides, f"run.dir={Path(sweep.out) / f'nodes{nodes}'}"], FAMILIES)
        name = f"{Path(sweep.out).name}_{nodes}"
        overrides = [absolute(sweep.config, point.overrides, FAMILIES) for point in some]
        job = Job(name, config, files, nodes, site, points=overrides)
        job.check()
        ids += [job.script()] if dry_run else submit(job)
        for point in () if dry_run else some:
            _begin(point)
    return ids
