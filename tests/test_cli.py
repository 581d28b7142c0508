"""The command line: one command with all others in it, their help, their older names; ranks on this machine."""

import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_refine import ranks as own_ranks
from megatron_refine.cli import COMMANDS
from megatron_refine.engine.launch import wait_until
from tests import runs
from tests.zygote import DEADLINE, Zygote

ROOT = Path(__file__).parents[1]
SHIMS = [*sorted((ROOT / "tools").glob("*.py")), ROOT / "launch/submit.py"]


def called(*line: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *line], cwd=ROOT, capture_output=True, encoding="utf-8")


def test_the_list_of_commands_is_that_of_the_modules() -> None:
    modules = {path.stem.replace("_", "-") for path in (ROOT / "megatron_refine/cli").glob("*.py")}
    assert set(COMMANDS) == (modules | {"train"}) - {"--init--", "asking"}
    shown = called("-m", "megatron_refine").stdout
    assert all(f"  {name} " in shown and text in shown for name, text in COMMANDS.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_explains_itself_without_torch(name: str) -> None:
    code = "import sys; from megatron_refine.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    done = called("-c", code, name, "--help")
    assert done.stdout.startswith(f"usage: megatron-refine {name} ") and done.stdout.endswith("False\n"), done.stderr


@pytest.mark.parametrize("path", SHIMS, ids=lambda path: path.stem)
def test_an_older_name_is_the_same_command(path: Path) -> None:
    name = path.read_text(encoding="utf-8").split("run(")[1].split('"')[1]
    assert called(str(path), "--help").stdout == called("-m", "megatron_refine", name, "--help").stdout != ""


@pytest.mark.parametrize("path", SHIMS, ids=lambda path: path.stem)
def test_an_older_name_passes_the_code_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_refine.cli.run", lambda name: 7)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 7


@pytest.mark.parametrize(("name", "hint"), [("trian", "did you mean train?"), ("xyzzy", "choose one of train, ")])
def test_a_command_that_does_not_exist_is_one_line(name: str, hint: str) -> None:
    done = called("-m", "megatron_refine", name)
    assert done.returncode == 2 and done.stderr.startswith(f"megatron-refine {name}: no such command; {hint}")
    assert done.stderr.count("\n") == 1


def test_ranks_are_started(tmp_path: Path) -> None:
    config = runs.write_config(tmp_path, tmp_path / "cache", train={"steps": 1}, refine={"enabled": False})
    done = called("-m", "megatron_refine", "train", "--config", str(config), "--ranks", "2", *runs.TP2)
    assert done.returncode == 0 and "step 1/1 loss" in done.stdout, done.stderr


@pytest.mark.parametrize(("ends", "code"), [("kill -9 $$", 137), ("exit 3", 3)])
def test_the_end_of_a_rank_is_that_of_the_command(
    ends: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = tmp_path / "rank"
    rank.write_text(f"#!/bin/sh\n{ends}\n", encoding="utf-8")
    rank.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(rank))
    assert own_ranks.start(1, ["train"]) == code


@pytest.mark.slow
def test_the_code_of_a_rank_is_passed_on(ranks: Zygote, tmp_path: Path) -> None:
    """Of two ranks that cannot start, the one line and the code are all that is told."""
    config = runs.write_config(tmp_path, tmp_path / "cache", train={"steps": 1}, refine={"enabled": False})
    line = ["--config", str(config), *runs.TP2]
    assert [end.code for end in ranks(2, runs.command, arguments=line)] == [0, 0]
    (tmp_path / "run/checkpoints/step_0000001/__0_0.distcp").write_bytes(b"damaged")
    done = called("-m", "megatron_refine", "train", *line, "--ranks", "2", "train.steps=2")
    assert done.returncode == 4 and done.stderr.count("\n") == 1, done.stderr
    assert "step_0000001/__0_0.distcp: truncated" in done.stderr


@pytest.mark.parametrize(("ranks", "message"), [("-1", "--ranks=-1: must be 1 or more"), ("3", "world size 3 is no")])
def test_ranks_that_cannot_be(tmp_path: Path, ranks: str, message: str) -> None:
    config = runs.write_config(tmp_path, tmp_path / "cache")
    done = called("-m", "megatron_refine", "train", "--config", str(config), "--ranks", ranks, *runs.TP2)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("key", ["run.dir", "data.tokenizer", "checkpoint.load"])
def test_a_file_that_cannot_be_is_one_line(tmp_path: Path, key: str) -> None:
    config = runs.write_config(tmp_path, tmp_path / "cache")
    for start in (["-m", "megatron_refine", "train"], ["-m", "megatron_refine.train"]):
        done = called(*start, "--config", str(config), f"{key}={'x' * 300}")
        assert done.returncode == 4 and done.stderr.count("\n") == 1, done.stderr
        assert ": File name too long; name another file or folder, or mend this one" in done.stderr


RANK = """#!{python}
import pathlib, signal, sys, time
sys.path.insert(0, {root!r})
from megatron_refine.ranks import leave
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(leave(75)))
pathlib.Path({ready!r}).touch()
time.sleep(600)
"""


def test_a_signal_reaches_the_ranks_and_their_code_is_the_commands(tmp_path: Path) -> None:
    """It does not end what has started them, which would leave them alone."""
    rank, ready = tmp_path / "rank", tmp_path / "ready"
    rank.write_text(RANK.format(python=sys.executable, root=str(ROOT), ready=str(ready)), encoding="utf-8")
    rank.chmod(0o755)
    code = "import sys; from megatron_refine.ranks import start\n"
    code += "sys.executable = sys.argv[1]\nsys.exit(start(1, ['a']))"
    process = subprocess.Popen([sys.executable, "-c", code, str(rank)], cwd=ROOT)
    try:
        assert wait_until(lambda: ready.exists() or process.poll() is not None, DEADLINE) and ready.exists()
        process.send_signal(signal.SIGUSR1)
        assert process.wait(DEADLINE) == 75
    finally:
        process.kill()
