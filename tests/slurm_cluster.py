"""A SLURM cluster of two nodes on this machine, as root, without systemd: daemons, files and ports of its own."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.zygote import DEADLINE

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "ip")
MISSING = "needs root, and SLURM with munge: make test-slurm"
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))  # each has a cluster of its own
PORT = 26817 + 10 * WORKER  # of slurmctld; the nodes have the next ones
FIRST_JOB = 1 + 1000 * WORKER  # ranks meet at a port that follows from the job's number
GPUS = 2  # of a node; each is /dev/null's device, which SLURM takes for one

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
FirstJobId={job}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge/munge.sock,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=0,bf_interval=2,batch_sched_delay=0,defer_batch
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=3
MinJobAge=600
SlurmdTimeout=20
GresTypes=gpu
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=4 RealMemory=8000 Gres=gpu:{gpus}
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=00:30:00 State=UP
PartitionName=low Nodes=n[1-2] MaxTime=00:30:00 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=n[1-2] MaxTime=00:30:00 State=UP PriorityTier=10 PreemptMode=OFF
"""  # cred_expire: a requeued job waits that long, 120 s by default


def available() -> bool:
    """Whether a cluster can be started here."""
    return os.geteuid() == 0 and all(shutil.which(name) for name in PROGRAMS)


class Cluster:
    """Runs from construction to `stop`."""

    def __init__(self) -> None:
        # munge wants a socket that all can reach, which pytest's folders are not
        root = self.root = Path(tempfile.mkdtemp(prefix="slurm_", dir="/tmp"))
        self.conf = root / "etc/slurm.conf"
        for name in ("etc", "log", "run", "state", "spool/n1", "spool/n2", "munge", "dev"):
            (root / name).mkdir(parents=True)
        root.chmod(0o755)
        (root / "munge").chmod(0o711)
        ports = {"port": PORT, "first": PORT + 1, "last": PORT + 2, "job": FIRST_JOB, "gpus": GPUS}
        self.conf.write_text(CONF.format(root=root, host=socket.gethostname().split(".")[0], **ports), encoding="utf-8")
        for i in range(GPUS):
            os.mknod(root / f"dev/gpu{i}", 0o600 | 0o20000, os.makedev(1, 3))
        (root / "etc/gres.conf").write_text(f"Name=gpu File={root}/dev/gpu[0-{GPUS - 1}]\n", encoding="utf-8")
        key = root / "munge/munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self.environment = os.environ | {"SLURM_CONF": str(self.conf)}
        munge = {name: f"{root}/munge/munge.{name}" for name in ("socket", "seed")}
        self._start(["munged", f"--key-file={key}", f"--socket={root}/munge/munge.sock", f"--seed-file={munge['seed']}",
                     f"--pid-file={root}/run/munged.pid", f"--log-file={root}/log/munged.log"])  # fmt: skip
        self._start(["slurmctld", "-i", "-f", str(self.conf)])
        for node in ("n1", "n2"):
            self.start_node(node)
        self.until(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D") == "2", DEADLINE, "both nodes idle")

    def _start(self, command: list[str]) -> None:
        log = self.root / "log" / f"{command[0]}.start"
        with log.open("a", encoding="utf-8") as file:  # a daemon keeps it open: a pipe would never end
            done = subprocess.run(command, env=self.environment, stdout=file, stderr=file)
        assert done.returncode == 0, (command, log.read_text(encoding="utf-8"))

    def start_node(self, node: str) -> None:
        self._start(["slurmd", "-N", node, "-f", str(self.conf)])

    def kill_node(self, node: str) -> None:
        """SIGKILL to its daemon alone: what it started runs on. Then the node is set DOWN."""
        os.kill(self.pid(f"slurmd.{node}"), signal.SIGKILL)
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def pid(self, daemon: str) -> int:
        return int((self.root / f"run/{daemon}.pid").read_text(encoding="utf-8"))

    def run(self, *command: str) -> str:
        """What a client prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, encoding="utf-8")
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout.strip()

    def field(self, job: str, name: str) -> str:
        """Of `scontrol show job`."""
        words = self.run("scontrol", "-o", "show", "job", job).splitlines()[0].split(" ")
        return next(word.split("=", 1)[1] for word in words if word.startswith(f"{name}="))

    def until(self, condition: Callable[[], object], seconds: float, what: str) -> None:
        """Poll. Raises AssertionError with the queue and the daemons' last words."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if condition():
                return
            time.sleep(0.2)
        logs = [
            log.read_text(errors="replace", encoding="utf-8")[-1500:] for log in sorted((self.root / "log").iterdir())
        ]
        raise AssertionError("\n".join([f"not within {seconds} s: {what}", self.run("squeue", "-l"), *logs]))

    def ends(self, job: str, seconds: float = DEADLINE) -> str:
        """Wait for a job's end. Its state."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}
        self.until(lambda: self.field(job, "JobState") in over, seconds, f"end of job {job}")
        return self.field(job, "JobState")

    def stop(self) -> None:
        """Cancel all jobs, end the daemons: slurmctld last but one, munged last."""
        with contextlib.suppress(AssertionError):
            for job in set(self.run("squeue", "-h", "-o", "%A").split()):
                self.run("scancel", job)
            self.until(lambda: not self.run("squeue", "-h", "-t", "R,CG"), 30, "no job left")
        for daemon in ("slurmd.n1", "slurmd.n2", "slurmctld", "munged"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                pid = self.pid(daemon)
                os.kill(pid, signal.SIGTERM)
                if not _gone(pid, 10):
                    os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.root)


def _gone(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False
