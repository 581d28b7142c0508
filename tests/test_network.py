"""Two hosts, as network namespaces of this machine: a peer that is killed, a link that goes down, or flaps."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.slurm_cluster import WORKER
from tests.zygote import DEADLINE

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]
ROOT = Path(__file__).parents[1]
STEPS = 24
# namespace, interface, address
HOSTS = ((f"mr_a{WORKER}", "mr_va", "10.77.0.1"), (f"mr_b{WORKER}", "mr_vb", "10.77.0.2"))
SECTIONS: dict[str, dict[str, Any]] = {
    "train": {"steps": STEPS}, "checkpoint": {"every": 10}, "run": {"timeout_minutes": 0.2, "phase_minutes": 0.5},
}  # fmt: skip


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[None]:
    for name, *_ in HOSTS:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)  # of a run that was killed
        ip("netns", "add", name)
    (a, va, _), (b, vb, _) = HOSTS
    ip("link", "add", va, "netns", a, "type", "veth", "peer", "name", vb, "netns", b)
    for name, interface, address in HOSTS:
        ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
        for link in ("lo", interface):
            ip("-n", name, "link", "set", link, "up")
    yield
    for name, *_ in HOSTS:
        ip("netns", "del", name)


@pytest.fixture
def start(hosts: None, tmp_path: Path) -> Iterator[Callable[[], list[subprocess.Popen[str]]]]:
    """Rank 0 on the first host, rank 1 on the second, tensor parallel; the folder is shared."""
    config = runs.write_config(tmp_path, tmp_path / "data", **SECTIONS)
    started: list[subprocess.Popen[str]] = []

    def ranks() -> list[subprocess.Popen[str]]:
        for rank, (name, interface, _) in enumerate(HOSTS):
            environment = os.environ | {
                "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": HOSTS[0][2],
                "MASTER_PORT": "29500", "PYTHONFAULTHANDLER": "1", "GLOO_SOCKET_IFNAME": interface,
            }  # fmt: skip
            line = ["ip", "netns", "exec", name, sys.executable, "-m", "megatron_refine.train"]
            started.append(
                subprocess.Popen(
                    [*line, "--config", str(config), *runs.TP2], cwd=ROOT, env=environment,
                    stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8",
                )
            )  # fmt: skip
        return started[-2:]

    yield ranks
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def reach(folder: Path, step: int) -> None:
    metrics, end = folder / "run/metrics.jsonl", time.monotonic() + DEADLINE
    while time.monotonic() < end:
        if metrics.exists() and metrics.read_text(encoding="utf-8").count("\n") > step:
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} not reached")


def ends(processes: list[subprocess.Popen[str]]) -> tuple[list[int], list[str], float]:
    """Exit codes, errors, and the seconds until both have ended."""
    begin = time.monotonic()
    errors = []
    for process in processes:
        try:
            errors.append(process.communicate(timeout=DEADLINE)[1])
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # its stacks
            raise AssertionError(f"hangs; before it {errors}; {process.communicate()[1]}") from None
    return [process.returncode for process in processes], errors, time.monotonic() - begin


@pytest.fixture(scope="module")
def undisturbed(ranks: Any, tmp_path_factory: Any) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    config = runs.write_config(folder, folder / "data", **SECTIONS)
    found = ranks(2, runs.command, arguments=["--config", str(config), *runs.TP2], saves=False)
    assert [end.code for end in found] == [0, 0]
    return runs.rows(folder)


def test_a_peer_that_is_killed(start: Any, tmp_path: Path, undisturbed: Any) -> None:
    """The other ends at once with code 8 and says where it stood; the same command goes on, bit by bit."""
    processes = start()
    reach(tmp_path, 13)
    processes[1].send_signal(signal.SIGKILL)  # `ip netns exec` has become the rank
    codes, errors, seconds = ends(processes)
    assert codes == [8, -9] and seconds < 30, errors
    assert "rank 0 on " in errors[0] and "lost another rank" in errors[0]
    codes, errors, _ = ends(start())
    assert codes == [0, 0], errors
    assert runs.rows(tmp_path) == undisturbed


def test_a_link_that_stays_down(start: Any, tmp_path: Path, undisturbed: Any) -> None:
    """Both end with code 8 after run.timeout_minutes; once the link is up again the same command goes on."""
    processes = start()
    reach(tmp_path, 13)
    ip("-n", HOSTS[1][0], "link", "set", HOSTS[1][1], "down")
    codes, errors, seconds = ends(processes)
    assert codes == [8, 8] and 8 < seconds < 100, (seconds, errors)
    for rank, error in enumerate(errors):
        assert f"rank {rank} on " in error and "run the same command to go on" in error
    ip("-n", HOSTS[1][0], "link", "set", HOSTS[1][1], "up")
    codes, errors, _ = ends(start())
    assert codes == [0, 0], errors
    assert runs.rows(tmp_path) == undisturbed


def test_a_link_that_flaps(start: Any, tmp_path: Path, undisturbed: Any) -> None:
    """Down for four seconds of a deadline of twelve: the run waits, and goes on as if nothing had been."""
    processes = start()
    reach(tmp_path, 13)
    ip("-n", HOSTS[1][0], "link", "set", HOSTS[1][1], "down")
    time.sleep(4)
    ip("-n", HOSTS[1][0], "link", "set", HOSTS[1][1], "up")
    codes, errors, _ = ends(processes)
    assert codes == [0, 0], errors
    assert runs.rows(tmp_path) == undisturbed
