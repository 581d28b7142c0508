"""Where this process stands among those that were started with it: the one reader of the launcher's variables.

torchrun's variables come first, then those of a SLURM step. A step alone counts: in a job's script, and in a shell of
an allocation, SLURM_NTASKS speaks of processes that nobody has started. An empty variable is one that is not set.
Imports neither torch nor anything of the project.
"""

import os
import re
import socket
import sys
from dataclasses import dataclass
from typing import Any

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
FIRST_PORT, PORTS = 20000, 12000  # below those that Linux gives to outgoing connections
REMEDY = "start the ranks with torchrun or srun, or unset the launcher's variables"
_HOST = re.compile(r"[^\s:/\[\],]+|[0-9A-Fa-f:.%]*:[0-9A-Fa-f:.]*:[\w.%]*")  # a name, an IPv4 or an IPv6 address


class LaunchError(ValueError):
    """What is wrong with the launcher's variables: one line that names them, and the remedy."""


@dataclass(frozen=True)
class Launch:
    """A process's place, and the job that it belongs to."""

    rank: int
    world: int
    local: int  # rank among those of this machine
    here: int  # ranks of this machine; under SLURM those of the step's first one
    node: int  # this machine's number in the step
    job: str  # SLURM's, "" without one
    restart: int  # how often the job was requeued
    end: float  # of the job's time, unix time; inf where none is known
    threads: int  # of a process


def read() -> Launch:
    """This process's place; alone where no launcher says otherwise. Raises LaunchError."""
    names = _variables()
    world = 1 if names is None else _needed(names[1], 1)
    if world == 1:
        _no_mpi()
    if names is None:
        return Launch(0, 1, 0, 1, **_surroundings())
    rank, local = _needed(names[0]), _number(names[2], 0)
    here = most = _number("LOCAL_WORLD_SIZE", world, 1, world) if names == TORCHRUN else world
    _below(names[0], rank, names[1], world)
    _below(names[2], local, names[1] if most == world else "LOCAL_WORLD_SIZE", most)
    if names != TORCHRUN and (tasks := re.match("[1-9][0-9]*", _text("SLURM_STEP_TASKS_PER_NODE"))):
        here = int(tasks[0])  # as in 8(x2),4
    return Launch(rank, world, local, here, **_surroundings())


def _no_mpi() -> None:
    """Raise LaunchError in one of several processes of mpirun: each would take itself for the only one."""
    for name in MPI:
        if _number(name, 1) > 1:
            raise LaunchError(f"{name}={_text(name)}: ranks that mpirun starts do not find each other; {REMEDY}")


def _variables() -> tuple[str, str, str] | None:
    """Names of the rank, of the number of ranks, and of the rank on this machine; None for a process that is alone."""
    if _text("RANK") or _text("WORLD_SIZE") or (_text("LOCAL_RANK") and not _in_step()):
        return TORCHRUN
    if not _in_step():
        return None
    world = "SLURM_STEP_NUM_TASKS" if _text("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    return "SLURM_PROCID", world, "LOCAL_RANK" if _text("LOCAL_RANK") else "SLURM_LOCALID"


def _surroundings() -> dict[str, Any]:
    """Read what the launcher says of the job and the machine."""
    end, threads = _text("SLURM_JOB_END_TIME"), _text("OMP_NUM_THREADS").partition(",")[0]  # nested levels follow
    return {
        "node": _number("SLURM_NODEID", 0),
        "job": str(_number("SLURM_JOB_ID", 0)) if _text("SLURM_JOB_ID") else "",
        "restart": _number("SLURM_RESTART_COUNT", 0),
        "end": float("inf") if end in ("", "Unknown", "NONE") else float(_whole("SLURM_JOB_END_TIME", end)),
        "threads": _whole("OMP_NUM_THREADS", threads, 1) if threads else 1,
    }


def meeting(launch: Launch) -> tuple[str, int]:
    """Address and port where the ranks meet; port 0 for a process that is alone: any. Raises LaunchError.

    MASTER_ADDR and MASTER_PORT, else those of the step: its first machine, and a port that no other step of the job, no
    job near it and no restart of it has. An orphan of an earlier attempt may still listen at its own.
    """
    address, port = _text("MASTER_ADDR"), _number("MASTER_PORT", 0, 0, 65535)
    alone = launch.world == 1
    if not address:
        nodes = (_text("SLURM_STEP_NODELIST") or _text("SLURM_JOB_NODELIST")) if _in_step() else ""
        if not nodes and not alone:
            raise LaunchError(f"MASTER_ADDR is not set, and there are {launch.world} ranks; {REMEDY}")
        address = first_host(nodes) if nodes else "127.0.0.1"
    if not _HOST.fullmatch(address):
        raise LaunchError(f"MASTER_ADDR={address}: must be the name or the address of a machine; its port: MASTER_PORT")
    if not port and not alone:
        if not _in_step():
            raise LaunchError(f"MASTER_PORT is not set, and there are {launch.world} ranks; {REMEDY}")
        number = _needed("SLURM_JOB_ID") + 1016 * launch.restart + 2589 * _needed("SLURM_STEP_ID")
        port = FIRST_PORT + number % PORTS
    return address, port


def reserve_port(host: str) -> socket.socket:
    """Return a free port, held: while the socket is open no other program is given it, and a server can still bind it.

    A server, and a first rank, bind their port seconds after they were started. Linux lets them, as both allow the
    reuse of the address and this socket does not listen.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind((host, 0))
    return held


def check() -> Launch:
    """`read`, and whether one of several ranks knows its device and the meeting point. Raises LaunchError."""
    launch, names, dist = read(), _variables(), sys.modules.get("torch.distributed")
    if names and launch.world > 1:
        _needed(names[2])
    if dist is None or not dist.is_initialized():
        meeting(launch)
    return launch


def under_torchrun() -> bool:
    """Whether torchrun watches this process, and passes signals on in its own way."""
    return bool(_text("TORCHELASTIC_RUN_ID"))


def speaks() -> bool:
    """Whether this process says what is wrong: the first rank for all, and one that does not know its rank."""
    try:
        return read().rank == 0
    except LaunchError:
        return (_text("RANK") or _text("SLURM_PROCID") or "0") == "0"


def first_host(nodes: str) -> str:
    """The first of SLURM's compressed list of machines: `rack[1-2]n[07,12],login` -> rack1n07. Raises LaunchError."""
    found = re.match(r"(?:[^,\[\]\s]|\[[^,\[\]\s-]+(?:[-,][^\[\]\s]*)?\])+(?=,|$)", nodes)
    if not found:
        raise LaunchError(f"SLURM's list of nodes {nodes!r}: cannot be read; set MASTER_ADDR")
    return re.sub(r"\[([^,\]-]+)[^\]]*\]", r"\1", found.group())


def _in_step() -> bool:
    """Whether srun started this process. Outside of a step there is none but the first."""
    return _number("SLURM_STEP_ID", -1) >= 0 or _number("SLURM_PROCID", 0) > 0


def _text(name: str) -> str:
    return os.environ.get(name, "").strip()


def _needed(name: str, least: int = 0) -> int:
    if not _text(name):
        raise LaunchError(f"{name} is not set, but others of the launcher's variables are; {REMEDY}")
    return _whole(name, _text(name), least)


def _number(name: str, default: int, least: int = 0, most: int | None = None) -> int:
    return _whole(name, _text(name), least, most) if _text(name) else default


def _whole(name: str, text: str, least: int = 0, most: int | None = None) -> int:
    """A number that is written as one, within bounds. Raises LaunchError."""
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < least or (most is not None and int(text) > most):
        bounds = f"from {least} on" if most is None else f"from {least} to {most}"
        raise LaunchError(f"{name}={text}: must be a whole number {bounds}; {REMEDY}")
    return int(text)


def _below(name: str, number: int, limit_name: str, limit: int) -> None:
    if number >= limit:
        raise LaunchError(f"{name}={number}: must be below {limit_name}={limit}; {REMEDY}")
