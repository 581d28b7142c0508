"""Ctrl-C: a command ends with one line; a run saves first, under torchrun too; what helps with a save is spared."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_refine.run import interrupt
from megatron_refine.run.session import Session
from tests import runs
from tests.zygote import DEADLINE

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120"}


@contextmanager
def begun(*line: str) -> Iterator["subprocess.Popen[str]"]:
    """A command in a process group of its own, as a terminal starts it; nothing of it outlives the test."""
    process = subprocess.Popen(
        [sys.executable, *line], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        encoding="utf-8", start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize(
    "line", [["-m", "megatron_refine.train"], ["tools/prepare_data.py"], ["tools/bench.py", "step"]], ids=" ".join
)
def test_a_command_that_is_interrupted_ends_with_one_line(tmp_path: Path, line: list[str]) -> None:
    """While it reads its configuration, a pipe that nobody fills."""
    os.mkfifo(tmp_path / "pipe")
    with begun(*line, "--config", str(tmp_path / "pipe")) as process:
        writer = os.open(tmp_path / "pipe", os.O_WRONLY)  # waits until it reads
        time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        assert process.communicate(timeout=DEADLINE) == ("", "interrupted\n") and process.returncode == 130
        os.close(writer)


def test_every_tool_ends_so() -> None:
    """By `cli.run`, whatever name they are called by."""
    shims = [*sorted((ROOT / "tools").glob("*.py")), ROOT / "launch/submit.py"]
    assert len(shims) == 15
    assert [path.name for path in shims if "sys.exit(run(" not in path.read_text(encoding="utf-8")] == []
    assert "quiet(call)" in (ROOT / "megatron_refine/cli/__init__.py").read_text(encoding="utf-8")


SAME = 3.0  # seconds: a busy machine may deliver the second of two signals late
LISTENER = """
import hashlib, multiprocessing, os, sys, time
from megatron_refine.run import interrupt
interrupt.SAME = float(sys.argv[2])
interrupt.listen()
def helper():
    os.write(1, b"helper\\n"); time.sleep(1.5); os.write(1, b"helped\\n")
if sys.argv[1] == "training":
    interrupt.ask_first(lambda: print("asked", flush=True))
    process = multiprocessing.get_context("fork").Process(target=helper); process.start()
os.write(1, b"ready\\n")
hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # native code, in which no handler of Python's runs
"""


def test_before_training_it_ends_at_once() -> None:
    with begun("-c", LISTENER, "preparation", str(SAME)) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130 and out == ""
    assert err == "interrupted before a step was trained: the run is as it was; run the same command to go on\n"


def test_the_first_asks_and_the_second_ends() -> None:
    """Of two that come at once, one counts; a forked helper goes on through all of them."""
    with begun("-c", LISTENER, "training", str(SAME)) as process:
        assert process.stdout
        assert {process.stdout.readline() for _ in range(2)} == {"ready\n", "helper\n"}
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout.readline() == "asked\n"
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(SAME + 0.1)
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130 and out == "helped\n"
    assert [line.split(":")[0] for line in err.splitlines()] == ["Ctrl-C", "ended at once"]


def shielded() -> list[str]:
    """On a rank: what a save's queue still does after signals that come as its process starts."""
    from multiprocessing import managers

    from megatron_refine.platform.megatron.saves import SHIELDED, shield_saves

    started = managers.SyncManager.start

    def signalled(self: Any, *arguments: Any) -> None:
        started(self, *arguments)
        for number in SHIELDED:
            os.kill(self._process.pid, number)

    managers.SyncManager.start = signalled  # type: ignore[method-assign]
    shield_saves()
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    queue: Any = filesystem_async._results_queue
    queue.put("result")
    return [queue.get()]


def test_the_process_of_a_saves_results_outlives_every_signal(ranks: Any) -> None:
    assert ranks(1, shielded) == [["result"]]


@pytest.mark.slow
def test_under_torchrun_both_ranks_save_before_they_end(tmp_path: Path) -> None:
    """A real torchrun, which passes the signal on to the sessions of its ranks."""
    config = runs.write_config(tmp_path, tmp_path / "data", train={"steps": 5000}, refine={"enabled": False})
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with begun(*torchrun, "-m", "megatron_refine.train", "--config", str(config), *runs.TP2) as process:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("step 2/"):
                break
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=DEADLINE)
    last = out.splitlines()[-1]
    assert last.startswith("stopped by SIGINT after step ") and "ended at once" not in err, (out, err)
    step = int(last.split()[5].rstrip(":"))
    assert (tmp_path / f"run/checkpoints/step_{step:07d}/COMPLETE").exists()
    assert process.returncode == 1 and "via Signals.SIGINT, forcefully" not in err


def verdicts() -> list[int]:
    """On a rank: what two ranks agree on after a step, when the clock is due on the first and the second is told to."""
    from megatron_refine.run.signals import StopRequest

    first, found = os.environ["RANK"] == "0", []
    for due, name in ((False, ""), (True, ""), (True, "SIGINT")):
        request = StopRequest(lambda: False, lambda: 0.0, lambda due=due: first and due)  # type: ignore[misc]
        request.name = "" if first else name
        found.append(int(request.agreed()))
    return found


def test_the_ranks_agree_on_a_save_and_on_an_end(ranks: Any) -> None:
    from megatron_refine.run.signals import Verdict

    assert ranks(2, verdicts) == [[Verdict.GO_ON, Verdict.SAVE, Verdict.STOP]] * 2


@pytest.mark.parametrize(
    ("minutes", "seconds", "step", "main", "resets", "due"),
    [
        (30.0, 1799.0, 0.0, True, False, False),
        (30.0, 1801.0, 0.0, True, False, True),
        (30.0, 1500.0, 400.0, True, False, True),  # the next step would lose more
        (0.0, 1e6, 0.0, True, False, False),
        (30.0, 1e6, 0.0, False, False, False),  # the first rank's clock alone
        (30.0, 1e6, 0.0, True, True, False),  # nothing to save
    ],
)
def test_a_save_is_due_before_more_than_checkpoint_minutes_could_be_lost(
    minutes: float, seconds: float, step: float, main: bool, resets: bool, due: bool
) -> None:
    session = SimpleNamespace(
        config=SimpleNamespace(resets=resets, checkpoint=SimpleNamespace(minutes=minutes)),
        watch=SimpleNamespace(longest={"step": step}), ranks=SimpleNamespace(is_main=main),
        _saved=time.monotonic() - seconds,
    )  # fmt: skip
    assert Session._save_due(session) == due  # type: ignore[arg-type]


def test_what_is_reserved_before_the_end_of_a_job() -> None:
    """The longest step, evaluation and save so far, and the reserve."""
    longest = {"step": 2.0, "evaluation": 30.0, "save": 7.0, "preparation": 1e3}
    config = SimpleNamespace(run=SimpleNamespace(reserve_minutes=1.0))
    session: Any = SimpleNamespace(watch=SimpleNamespace(longest=longest), config=config)
    assert Session._needed(session) == 99.0


def test_what_a_terminal_and_a_launcher_deliver_is_pressed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 0.4 seconds of each other; a second later it is a second one, which ends the process."""
    asked, ended, now = list[str](), list[str](), 100.0
    monkeypatch.setattr(interrupt, "_process", os.getpid())
    monkeypatch.setattr(interrupt, "_first", 0.0)
    monkeypatch.setattr(interrupt, "_ask", lambda: asked.append("save"))
    monkeypatch.setattr(interrupt, "_end", ended.append)
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: now)
    for now, ends in ((100.0, 0), (100.4, 0), (101.4, 1)):  # noqa: B007
        interrupt.pressed()
        assert asked == ["save"] and len(ended) == ends
