"""Runs as jobs of a real SLURM cluster: two nodes on this machine. `make test-slurm`."""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_refine.cli import submit
from tests import runs, sglang_lane
from tests.slurm_cluster import GPUS, Cluster
from tests.zygote import DEADLINE

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]
ROOT = Path(__file__).parents[1]
STEPS = 40
SITE = {
    "time": "00:10:00", "gpus_per_node": 0, "cpu_ranks": 1, "signal_seconds": 60, "python": sys.executable,
    "environment": {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "MASTER_ADDR": "127.0.0.1"},
}  # fmt: skip
SECTIONS: dict[str, dict[str, Any]] = {
    "train": {"steps": STEPS, "micro_batch_size": 1}, "checkpoint": {"every": 10},
    "run": {"timeout_minutes": 1.0, "reserve_minutes": 0.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    os.environ["SLURM_CONF"] = str(cluster.conf)
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: Any) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def undisturbed(ranks: Any, cache: Path, tmp_path_factory: Any) -> Callable[[int], list[dict[str, Any]]]:
    """The metrics of the same run on `world` ranks, started by hand."""
    found: dict[int, list[dict[str, Any]]] = {}

    def rows(world: int) -> list[dict[str, Any]]:
        if world not in found:
            folder = tmp_path_factory.mktemp(f"undisturbed{world}")
            arguments = ["--config", str(runs.write_config(folder, cache, **SECTIONS))]
            ends = ranks(world, runs.command, arguments=arguments, saves=False)
            assert [end.code for end in ends] == [0] * world, ends
            found[world] = runs.rows(folder)
        return found[world]

    return rows


@dataclass
class Submitted:
    """A job, and the folder of its run."""

    job: str
    folder: Path
    cluster: Cluster

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def step(self) -> int:
        """The last that was recorded."""
        try:
            return int(json.loads((self.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])["step"])
        except (OSError, IndexError):
            return -1

    def reaches(self, step: int) -> None:
        self.cluster.until(lambda: self.step() >= step, DEADLINE, f"step {step} of {self.run}: {self.log()[-2000:]}")

    def log(self) -> str:
        return "".join(path.read_text(encoding="utf-8") for path in sorted((self.run / "logs").glob("slurm-*.out")))

    def ends_as(self, rows: list[dict[str, Any]], restarts: int) -> None:
        """Completed after so many restarts, with the metrics of an undisturbed run, bit by bit."""
        assert self.cluster.ends(self.job) == "COMPLETED", self.log()
        assert self.cluster.field(self.job, "Restarts") == str(restarts), self.log()
        assert runs.rows(self.folder) == rows


def check_begins(rows: list[dict[str, Any]], undisturbed: list[dict[str, Any]]) -> None:
    """Each step is there once, and the first are those of a shorter run, but for its last, which evaluates."""
    assert [row["step"] for row in rows] == list(range(len(rows)))
    shared = min(len(rows), STEPS) - 1
    assert rows[:shared] == undisturbed[:shared]


@pytest.fixture
def start(cluster: Cluster, cache: Path, tmp_path: Path) -> Callable[..., Submitted]:
    """Submit the run by launch/submit.py; keywords are keys of the site."""

    def started(*arguments: str, **site: Any) -> Submitted:
        config = runs.write_config(tmp_path, cache, **SECTIONS)
        (tmp_path / "site.yaml").write_text(yaml.safe_dump(SITE | site), encoding="utf-8")
        options = submit.parse([str(config), "--site", str(tmp_path / "site.yaml"), *arguments])
        return Submitted(submit.submit(submit.build(options), options.chain)[-1], tmp_path, cluster)

    return started


def test_two_nodes_with_two_tasks_each(start: Any, undisturbed: Any, cluster: Cluster) -> None:
    """Ranks, rendezvous and GPUs from SLURM: the run of four ranks that were started by hand."""
    prologue = 'echo "GPUs of the first node: ${SLURM_JOB_GPUS:-none}"'
    run = start("--nodes", "2", gpus_per_node=GPUS, prologue=prologue)
    run.ends_as(undisturbed(4), restarts=0)
    assert "GPUs of the first node: 0,1" in run.log() and cluster.field(run.job, "NumNodes") == "2"
    assert (run.run / f"logs/slurm-{run.job}-0/ranks.log").read_text(encoding="utf-8").startswith("0: ")


def test_a_requeued_job_goes_on(start: Any, undisturbed: Any, cluster: Cluster) -> None:
    run = start("--nodes", "2")
    run.reaches(13)
    cluster.run("scontrol", "requeue", run.job)
    run.ends_as(undisturbed(2), restarts=1)


def test_a_signal_before_the_end_of_its_time_saves_and_requeues(start: Any, undisturbed: Any, cluster: Cluster) -> None:
    """Told by `--signal`'s SIGUSR1 to the script: the trainer saves, the script requeues itself."""
    run = start("--nodes", "2")
    run.reaches(13)
    cluster.run("scancel", "--signal=USR1", "--batch", run.job)
    run.ends_as(undisturbed(2), restarts=1)
    log = run.log()
    assert "told to stop" in log and "stopped by SIGUSR1 after step" in log and "stopped after saving; requeued" in log


def test_the_time_limit_itself(start: Any, undisturbed: Any) -> None:
    """A job of a minute, told 40 s before: it takes as many minutes as it needs."""
    run = start("train.steps=400", "checkpoint.every=0", time="00:01:00", signal_seconds=40)
    run.reaches(1)
    run.cluster.until(lambda: "stopped after saving; requeued" in run.log(), DEADLINE, "the first end")
    assert "TIMEOUT" not in run.cluster.field(run.job, "JobState")
    stopped = run.step()
    run.reaches(stopped + 1)
    run.cluster.run("scancel", run.job)
    run.cluster.ends(run.job)
    check_begins(runs.rows(run.folder), undisturbed(1))


def test_a_job_is_preempted_and_goes_on(start: Any, undisturbed: Any, cluster: Cluster, tmp_path: Path) -> None:
    run = start("--nodes", "2", partition="low")
    run.reaches(13)
    job = cluster.run("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null",
                      "--wrap", "true")  # fmt: skip
    assert cluster.ends(job) == "COMPLETED"
    run.ends_as(undisturbed(2), restarts=1)
    assert "stopped by SIGTERM after step" in run.log()


def test_a_lost_node_whose_processes_run_on_cannot_write(start: Any, undisturbed: Any, cluster: Cluster) -> None:
    """The node's daemon is killed and the node set DOWN: the job starts on the other node, while the orphan trains."""
    run = start("train.steps=400")
    run.reaches(5)
    node, orphan = (
        cluster.field(run.job, "NodeList"),
        json.loads((run.run / "OWNER").read_text(encoding="utf-8"))["pid"],
    )
    cluster.kill_node(node)
    try:
        cluster.until(lambda: cluster.field(run.job, "Restarts") == "1", DEADLINE, "requeue")
        assert Path(f"/proc/{orphan}").exists()
        cluster.until(lambda: not Path(f"/proc/{orphan}").exists(), DEADLINE, "the orphan's end")
        run.reaches(run.step() + 1)
        cluster.run("scancel", run.job)
        assert cluster.ends(run.job) == "CANCELLED"
        first = (run.run / "logs/attempt_1/train.log").read_text(encoding="utf-8")
        assert re.search("has taken over.*; this (one|attempt) .*writes no", first)  # after a step, or in a save
    finally:
        cluster.start_node(node)
        cluster.until(
            lambda: cluster.run("sinfo", "-h", "-t", "idle", "-o", "%D") == "2", DEADLINE, "the node's return"
        )
    check_begins(runs.rows(run.folder), undisturbed(1))


def test_a_killed_rank_is_a_failure_that_is_tried_again(start: Any, undisturbed: Any, cluster: Cluster) -> None:
    """SIGKILL of the second rank: the first says what it lost, the script counts and requeues."""
    run = start("--nodes", "2")
    run.reaches(13)
    cluster.run("scancel", "--signal=KILL", f"{run.job}.0")
    run.ends_as(undisturbed(2), restarts=1)
    assert "(failure 1; 3 retries); requeued" in run.log()


def test_a_failure_that_running_again_does_not_mend(start: Any, cluster: Cluster, tmp_path: Path) -> None:
    run = start("data.paths=[/nowhere]")
    assert cluster.ends(run.job) == "FAILED" and cluster.field(run.job, "Restarts") == "0"
    assert cluster.field(run.job, "ExitCode") == "2:0"
    assert "/nowhere" in run.log() and "failed with code 2, which running again does not mend" in run.log()


def test_a_folder_with_a_blank_and_a_percent_sign(start: Any, cluster: Cluster, tmp_path: Path) -> None:
    """As SLURM itself reads the script and the commands in it: logs and ranks share the run's folder."""
    folder = tmp_path / "a b%j#c"
    run = start("--name", "my #1 job", f"run.dir={folder}", "data.paths=[/nowhere]")
    assert cluster.ends(run.job) == "FAILED" and cluster.field(run.job, "ExitCode") == "2:0"
    log = (folder / f"logs/slurm-{run.job}.out").read_text(encoding="utf-8")
    assert "/nowhere" in log and "failed with code 2" in log
    assert "/nowhere" in (folder / f"logs/slurm-{run.job}-0/ranks.log").read_text(encoding="utf-8")
    assert "JobName=my #1 job " in cluster.run("scontrol", "-o", "show", "job", run.job)


def test_a_process_outside_of_a_step_is_alone(start: Any, cluster: Cluster) -> None:
    """In the script of a job of two nodes with two tasks each; and two steps at once, on a node each, do not meet."""
    python = f"{sys.executable} -c"
    place = "from megatron_refine import launcher as l; p = l.read(); print(p.rank, p.world, *l.meeting(p))"
    prologue = f"""export PYTHONPATH={ROOT}
unset MASTER_ADDR
echo "script: $({python} '{place}')"
for n in 0 1; do echo "step: $(srun --nodes=1 --ntasks=2 --relative=$n --cpu-bind=none {python} '{place}' | sort)"; done
exit 0"""
    run = start("--nodes", "2", prologue=prologue, cpu_ranks=2)
    assert cluster.ends(run.job) == "COMPLETED", run.log()
    job = int(run.job)
    assert "script: 0 1 127.0.0.1 0" in run.log()
    for step, node in ((0, "n1"), (1, "n2")):
        port = 20000 + (job + 2589 * step) % 12000
        assert f"step: 0 2 {node} {port}\n1 2 {node} {port}" in run.log(), run.log()


def test_retries_come_to_an_end(start: Any, cluster: Cluster) -> None:
    """An interpreter that ends with code 1 at once."""
    run = start(python="/bin/false", retries=1)
    assert cluster.ends(run.job) == "FAILED" and cluster.field(run.job, "Restarts") == "1"
    assert "failed with code 1, 2 times without a new checkpoint" in run.log()


def test_a_cancelled_job_stays_away(start: Any, cluster: Cluster) -> None:
    """It saves on SIGTERM, as ever, and is not requeued."""
    run = start()
    run.reaches(5)
    cluster.run("scancel", run.job)
    assert cluster.ends(run.job) == "CANCELLED"
    time.sleep(3)
    assert cluster.field(run.job, "JobState") == "CANCELLED" and cluster.field(run.job, "Restarts") == "0"


def test_a_sweep_is_an_array(start: Any, undisturbed: Any, cluster: Cluster, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("optimizer.lr: [1e-3, 2e-3]\n", encoding="utf-8")
    run = start("--array", str(sweep), "--at-once", "2", "train.steps=12")
    for task in ("0", "1"):
        assert cluster.ends(f"{run.job}_{task}") == "COMPLETED", run.log()
    first, second = (tmp_path / "run" / f"lr={lr}" for lr in ("0.001", "0.002"))
    losses = [(p / "metrics.jsonl").read_text(encoding="utf-8").count("\n") for p in (first, second)]
    assert losses == [13, 13]
    last = [
        json.loads((p / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])["train/loss"]
        for p in (first, second)
    ]
    assert last[0] != last[1] and last[0] == undisturbed(1)[12]["train/loss"]


def test_a_chain_goes_on_where_the_link_before_it_ended(start: Any, undisturbed: Any, cluster: Cluster) -> None:
    """afterany: the first link is told to stop, and does not come back; the second does the rest."""
    run = start("--chain", "2")
    first = str(int(run.job) - 1)
    run.reaches(5)
    cluster.run("scancel", "--signal=USR1", "--batch", first)
    assert cluster.ends(first) == "FAILED" and cluster.field(first, "ExitCode") == "75:0"
    run.ends_as(undisturbed(1), restarts=0)
    assert cluster.field(first, "Restarts") == "0"


@pytest.mark.skipif(not sglang_lane.INSTALLED, reason=sglang_lane.MISSING)
def test_a_node_with_a_server(start: Any, cluster: Cluster) -> None:
    """One node trains, the other serves its rollouts, found by its address; both end with the job."""
    engine = ["engine.kind=sglang", f"engine.python={sglang_lane.PYTHON}", "engine.request_timeout=60",
              f"engine.args={json.dumps(sglang_lane.SERVER_ARGS)}", "train.steps=3"]  # fmt: skip
    run = start("--engine-nodes", "1", *engine)
    assert cluster.ends(run.job, DEADLINE) == "COMPLETED", run.log()
    rows = runs.rows(run.folder)
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and all(
        row["rollout/logprob_gap_max"] < 1e-4 for row in rows[1:]
    )
    assert cluster.field(run.job, "NumNodes") == "2" and "[]" not in run.log()
    servers = list((run.run / f"logs/slurm-{run.job}-0").glob("engine-*.log"))
    assert len(servers) == 1 and "/generate" in servers[0].read_text(encoding="utf-8")


def test_servers_that_cannot_start_end_the_job(start: Any, cluster: Cluster, tmp_path: Path) -> None:
    """An interpreter that lacks SGLang on the nodes alone: the trainer does not wait for the servers."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ -z "$SLURM_STEP_ID" ] || exit 3\nexec {sys.executable} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    run = start("--engine-nodes", "1", "engine.kind=sglang", f"engine.python={python}")
    assert cluster.ends(run.job, DEADLINE / 2) == "FAILED" and cluster.field(run.job, "ExitCode") == "2:0"
    assert f"engine.python={python}: has no SGLang" in run.log() and cluster.field(run.job, "Restarts") == "0"
