"""Where a process stands, from torchrun's and SLURM's variables; what contradicts itself is a line, never a wait."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_refine import launcher
from megatron_refine.errors import LostError
from megatron_refine.launcher import LaunchError
from megatron_refine.platform import rendezvous
from megatron_refine.run.exits import ending_of
from tests.runs import write_config
from tests.zygote import DEADLINE

ROOT = Path(__file__).parents[1]
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
BATCH = {  # of an sbatch script and of a shell that salloc opens; of two nodes with two tasks each
    "SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
    "SLURM_JOB_NODELIST": "gpu[01-02]",
}  # fmt: skip
STEP = BATCH | {
    "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[01-02]",
}  # fmt: skip
SHELL = STEP | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}  # fmt: skip


def only(variables: dict[str, str]) -> dict[str, str]:
    """This environment with no other variables of a launcher than these."""
    kept = {name: text for name, text in os.environ.items() if name not in NAMES and not name.startswith("SLURM_")}
    return kept | variables


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What is read from an environment: rank, world, local rank, address and port of the meeting."""

    def read(variables: dict[str, str]) -> tuple[int, int, int, str, int]:
        monkeypatch.setattr(os, "environ", only(variables))
        launch = launcher.read()
        assert (rendezvous.global_rank(), rendezvous.world_size(), rendezvous.local_rank()) == (
            launch.rank, launch.world, launch.local
        )  # fmt: skip
        return launch.rank, launch.world, launch.local, *launcher.meeting(launch)

    return read


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, 0, "127.0.0.1", 0)),
        ({"RANK": "", "WORLD_SIZE": ""}, (0, 1, 0, "127.0.0.1", 0)),
        (TORCHRUN, (3, 4, 1, "10.0.0.1", 29500)),
        (STEP | TORCHRUN, (3, 4, 1, "10.0.0.1", 29500)),
        (BATCH | TORCHRUN, (3, 4, 1, "10.0.0.1", 29500)),
        (STEP, (3, 4, 1, "gpu01", 20077)),
        (STEP | {"SLURM_STEP_NODELIST": "gpu02"}, (3, 4, 1, "gpu02", 20077)),
        (STEP | {"SLURM_STEP_NODELIST": ""}, (3, 4, 1, "gpu01", 20077)),
        (STEP | {"SLURM_NTASKS": "16"}, (3, 4, 1, "gpu01", 20077)),
        (STEP | {"SLURM_STEP_NUM_TASKS": ""}, (3, 4, 1, "gpu01", 20077)),
        (STEP | {"LOCAL_RANK": "0"}, (3, 4, 0, "gpu01", 20077)),
        (STEP | {"MASTER_ADDR": "::1", "MASTER_PORT": "5"}, (3, 4, 1, "::1", 5)),
        (BATCH, (0, 1, 0, "127.0.0.1", 0)),
        (SHELL, (0, 1, 0, "gpu01", 0)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, 0, "127.0.0.1", 0)),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, (0, 1, 0, "127.0.0.1", 0)),
    ],
    ids=["alone", "empty", "torchrun", "torchrun in a step", "torchrun in a job's script", "step", "a step's own node",
         "no list of the step's", "a step of fewer tasks than the job", "older names", "a device of its own",
         "a meeting point that is named", "a job's script", "a shell in an interactive step", "one rank",
         "one of mpirun"],
)  # fmt: skip
def test_the_place_of_a_process(found: Any, variables: dict[str, str], expected: tuple[Any, ...]) -> None:
    assert found(variables) == expected


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"LOCAL_RANK": "1"}, "WORLD_SIZE is not set"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_SIZE=4: ranks that mpirun"),
        (SHELL | {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_SIZE=4: ranks that"),
        (TORCHRUN | {"WORLD_SIZE": "two"}, "WORLD_SIZE=two: must be a whole number from 1 on"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "WORLD_SIZE=0: must be a whole number from 1 on"),
        (TORCHRUN | {"RANK": "-1"}, "RANK=-1: must be a whole number from 0 on"),
        (TORCHRUN | {"RANK": "1.0"}, "RANK=1.0: must be a whole number"),
        (TORCHRUN | {"RANK": "4"}, "RANK=4: must be below WORLD_SIZE=4"),
        (TORCHRUN | {"LOCAL_RANK": ""}, "LOCAL_RANK is not set"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "LOCAL_RANK=2: must be below LOCAL_WORLD_SIZE=2"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "", "LOCAL_RANK": "9"}, "LOCAL_RANK=9: must be below WORLD_SIZE=4"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE=8: must be a whole number from 1 to 4"),
        (TORCHRUN | {"MASTER_ADDR": ""}, "MASTER_ADDR is not set, and there are 4 ranks"),
        (TORCHRUN | {"MASTER_ADDR": "gpu01:29500"}, "MASTER_ADDR=gpu01:29500: must be the name or the address"),
        (TORCHRUN | {"MASTER_PORT": ""}, "MASTER_PORT is not set, and there are 4 ranks"),
        (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT=http: must be a whole number from 0 to 65535"),
        (TORCHRUN | {"MASTER_PORT": "65536"}, "MASTER_PORT=65536: must be a whole number from 0 to 65535"),
        (TORCHRUN | {"OMP_NUM_THREADS": "all"}, "OMP_NUM_THREADS=all: must be a whole number from 1 on"),
        (STEP | {"SLURM_STEP_NUM_TASKS": "", "SLURM_NTASKS": ""}, "SLURM_NTASKS is not set"),
        (STEP | {"SLURM_STEP_NUM_TASKS": "4(x2)"}, "SLURM_STEP_NUM_TASKS=4(x2): must be a whole number"),
        (STEP | {"SLURM_PROCID": ""}, "SLURM_PROCID is not set"),
        (STEP | {"SLURM_PROCID": "7"}, "SLURM_PROCID=7: must be below SLURM_STEP_NUM_TASKS=4"),
        (STEP | {"SLURM_LOCALID": ""}, "SLURM_LOCALID is not set"),
        (STEP | {"SLURM_JOB_ID": ""}, "SLURM_JOB_ID is not set"),
        (STEP | {"SLURM_STEP_ID": ""}, "SLURM_STEP_ID is not set"),
        (STEP | {"SLURM_STEP_ID": "batch"}, "SLURM_STEP_ID=batch: must be a whole number"),
        (STEP | {"SLURM_STEP_NODELIST": "gpu[01-"}, "list of nodes 'gpu[01-': cannot be read; set MASTER_ADDR"),
        (STEP | {"SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": ""}, "MASTER_ADDR is not set"),
        (BATCH | {"SLURM_RESTART_COUNT": "once"}, "SLURM_RESTART_COUNT=once: must be a whole number"),
        (BATCH | {"SLURM_JOB_END_TIME": "noon"}, "SLURM_JOB_END_TIME=noon: must be a whole number"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_a_line(monkeypatch: pytest.MonkeyPatch, variables: Any, says: str) -> None:
    monkeypatch.setattr(os, "environ", only(variables))
    monkeypatch.delitem(sys.modules, "torch.distributed", raising=False)  # no group that was joined before
    with pytest.raises(LaunchError) as caught:
        launcher.check()
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"), ("gpu[03-07,9],login1", "gpu03"), ("a1,b[2-3]", "a1"), ("n[12,14]", "n12"),
        ("gpu[01-02,05]", "gpu01"), ("a1-b[2-3],c", "a1-b2"), ("rack[1-2]n[01-04]", "rack1n01"),
        ("rack[2,4]n[07,09-12],x", "rack2n07"), ("n[3]-ib,n4", "n3-ib"), ("a-b.c,d", "a-b.c"),
    ],
)  # fmt: skip
def test_the_first_host_of_a_list_of_nodes(nodes: str, first: str) -> None:
    assert launcher.first_host(nodes) == first


@pytest.mark.parametrize("nodes", ["", ",a", "n[", "n]", "n[]", "n[1-2", "n[1]]", "n[-2]", "a b", "(null) x"])
def test_a_list_of_nodes_that_is_none(nodes: str) -> None:
    with pytest.raises(LaunchError, match="cannot be read; set MASTER_ADDR"):
        launcher.first_host(nodes)


def test_steps_restarts_and_jobs_do_not_meet(found: Any) -> None:
    """Of 40 jobs in a row, their first four restarts and steps."""
    ports = {
        found(STEP | {"SLURM_JOB_ID": str(job), "SLURM_RESTART_COUNT": str(restart), "SLURM_STEP_ID": str(step)})[4]
        for job in range(11990, 12030) for restart in range(4) for step in range(4)
    }  # fmt: skip
    assert len(ports) == 40 * 4 * 4 and min(ports) >= 20000 and max(ports) < 32000


def test_the_job_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt's number and the end of its time are the job's, in a step or not."""
    job = {"SLURM_RESTART_COUNT": "2", "SLURM_JOB_END_TIME": "1700000000", "OMP_NUM_THREADS": "4,2"}
    for place in (BATCH, STEP):
        monkeypatch.setattr(os, "environ", only(place | job))
        read = launcher.read()
        assert (read.job, read.restart, read.end, read.threads) == ("77", 2, 1.7e9, 4)
    for end in ("", "Unknown", "NONE"):
        monkeypatch.setattr(os, "environ", only({"SLURM_JOB_END_TIME": end}))
        read = launcher.read()
        assert (read.job, read.restart, read.end, read.threads) == ("", 0, float("inf"), 1)


COMMANDS = {
    "train": ["-m", "megatron_refine.train", "--config", "{config}"],
    "bench": ["tools/bench.py", "data", "--config", "{config}"],
    "evaluate": ["tools/evaluate.py", "none", "--tasks", "niah", "--out", "none"],
    "lm_eval_harness": ["tools/lm_eval_harness.py", "none", "--tasks", "arc_easy", "--out", "none"],
    "serve": ["tools/serve.py", "--hosts", "a", "--port", "1", "--config", "{config}"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_before_torch_is_imported(tmp_path: Path, name: str) -> None:
    """A torch that cannot be imported stands in its way."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')", encoding="utf-8")
    config, paths = write_config(tmp_path, tmp_path / "cache"), f"{tmp_path}:{ROOT}"
    line = [sys.executable, *(word.format(config=config) for word in COMMANDS[name])]
    bad = {"WORLD_SIZE=two": {"WORLD_SIZE": "two"}}
    if name == "serve":
        bad["SLURM_NODEID=one"] = {"SLURM_NODEID": "one"}
        bad["--hosts=a: none for SLURM_NODEID=1"] = {"SLURM_NODEID": "1"}
    if name == "train":
        bad["MASTER_PORT"] = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}
    for says, variables in bad.items():
        environment = only(variables) | {"PYTHONPATH": paths}
        done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", timeout=DEADLINE)
        assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize("rank", "01")
def test_a_port_that_something_else_listens_at(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rank cannot have it; another one gets no answer there, and does not wait beyond its deadline."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1]), "RANK": rank}
        monkeypatch.setattr(os, "environ", only(TORCHRUN | place))
        with pytest.raises(LostError, match="address already in use" if rank == "0" else r"no answer in 0\.05 minutes"):
            rendezvous.init_process_group(0.05)


def test_ranks_that_do_not_meet_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise torch.distributed.DistNetworkError("The client socket has timed out\nwhile trying to connect.")

    monkeypatch.setattr(torch.distributed, "rendezvous", fails)
    monkeypatch.setattr(os, "environ", only(TORCHRUN))
    with pytest.raises(LostError) as caught:
        rendezvous.init_process_group(1)
    code, line = ending_of(caught.value, "", speaks=False) or (0, "")
    assert code == 8 and "\n" not in line and "while trying to connect; start all of them, with an address" in line
    assert line.startswith("rank 3: the 4 ranks did not meet at MASTER_ADDR=10.0.0.1, MASTER_PORT=29500: The client")
