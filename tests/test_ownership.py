"""Who may write into a run's folder, and how a run ends that may not, or that hangs."""

import fcntl
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_refine.checkpoint import ownership
from megatron_refine.checkpoint.manifest import complete_folders
from megatron_refine.checkpoint.ownership import Ownership, attempt_token
from megatron_refine.config import ConfigError, load
from megatron_refine.errors import FencedError
from megatron_refine.launcher import reserve_port
from megatron_refine.models.family import FAMILIES
from megatron_refine.run import opening
from megatron_refine.run.watchdog import Watchdog
from tests import runs
from tests.rank_report import RankError
from tests.zygote import DEADLINE

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: Any) -> Path:
    return tmp_path_factory.mktemp("data")


def attempt(folder: Path, **token: Any) -> Ownership:
    return Ownership(folder, attempt_token() | token)


def test_the_attempt_that_claims_last_may_write(tmp_path: Path) -> None:
    first, second = attempt(tmp_path, pid=1), attempt(tmp_path, pid=2)
    first.claim()
    with first.held():
        pass
    assert not first.lost()
    second.claim()
    assert first.lost() and not second.lost()
    with pytest.raises(FencedError, match=r"process 2 on .* has taken over; this attempt \(process 1"), first.held():
        raise AssertionError("written")
    with second.held():
        pass
    assert first.name != second.name


def test_an_earlier_restart_of_the_same_job_cannot_claim(tmp_path: Path) -> None:
    """A node comes back and starts what SLURM has long started elsewhere."""
    attempt(tmp_path, job="7", restart=2).claim()
    with pytest.raises(FencedError, match=r"job 7, restart 2, .*has taken over; this attempt \(job 7, restart 1"):
        attempt(tmp_path, job="7", restart=1).claim()
    attempt(tmp_path, job="6", restart=0).claim()  # another job may: someone started it on purpose


def test_a_second_attempt_of_the_same_job_and_restart_takes_over(tmp_path: Path) -> None:
    """A script that starts the trainer twice; and without a job any attempt takes over from any."""
    first, second = attempt(tmp_path, job="7", restart=1, pid=1), attempt(tmp_path, job="7", restart=1, pid=2)
    first.claim()
    second.claim()
    assert first.lost() and not second.lost()
    attempt(tmp_path, job="7", restart=2).claim()
    attempt(tmp_path, job="", restart=0).claim()
    last = attempt(tmp_path, job="", restart=1, pid=3)
    last.claim()
    attempt(tmp_path, job="", restart=0, pid=4).claim()
    assert last.lost()


def test_a_lock_that_is_held_elsewhere_is_not_waited_for_forever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "LOCK_SECONDS", 0.2)
    owner = attempt(tmp_path)
    owner.claim()
    with (tmp_path / ".lock").open("w", encoding="utf-8") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        start = time.monotonic()
        with pytest.raises(FencedError, match=r"\.lock: another process has held it for 0 s; end that one"):
            owner.claim()
        with pytest.raises(FencedError), owner.held():
            raise AssertionError("written")
        assert 0.4 <= time.monotonic() - start < 5
    with owner.held():  # given back
        pass
    with owner.held():  # and given back by itself
        pass


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: Any, how: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(ownership.fcntl, "flock", flock)
    first, second = attempt(tmp_path, pid=1), attempt(tmp_path, pid=2)
    first.claim()
    second.claim()
    with second.held(), pytest.raises(FencedError):
        first.check()


def test_the_token_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    token = attempt_token()
    assert (token["job"], token["restart"], token["pid"]) == ("12", 3, os.getpid())
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    assert attempt_token()["restart"] == 0
    assert Ownership(Path(), token).name == f"12-3-{token['host']}-{os.getpid()}"
    assert Ownership(Path(), token | {"job": ""}).name.startswith("3-")


@pytest.mark.parametrize("content", ["", "\0\0", "{", "[]", '{"job": "7"}'])
def test_an_owner_that_was_torn(tmp_path: Path, content: str) -> None:
    """A claim passes over it; an attempt that finds its own torn writes nothing more."""
    owner, said = attempt(tmp_path), list[str]()
    owner.claim(said.append)
    assert said == []
    (tmp_path / "OWNER").write_text(content, encoding="utf-8")
    assert owner.lost()
    with pytest.raises(FencedError, match="damaged it has taken over"):
        owner.check()
    attempt(tmp_path, pid=2).claim(said.append)
    assert len(said) == 1 and said[0].startswith(f"{tmp_path}/OWNER: damaged: ")


def test_without_its_mark_an_attempt_does_not_write(tmp_path: Path) -> None:
    owner = attempt(tmp_path)
    owner.claim()
    (tmp_path / "OWNER").unlink()
    with pytest.raises(FencedError, match="someone who removed OWNER"):
        owner.check()


def test_a_claim_waits_for_a_writer(tmp_path: Path) -> None:
    """Another process holds the folder for half a second: what it does is done before the claim."""
    code = (
        "import sys, time; from pathlib import Path; from megatron_refine.checkpoint.ownership import *\n"
        "folder = Path(sys.argv[1]); owner = Ownership(folder, attempt_token()); owner.claim()\n"
        "with owner.held():\n"
        "    print('held', flush=True); time.sleep(0.5); (folder / 'written').write_text('')\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline() == b"held\n"
        attempt(tmp_path).claim()
        assert (tmp_path / "written").exists()
    assert other.returncode == 0


def test_a_run_that_another_attempt_takes_over_writes_nothing_more(ranks: Any, tmp_path: Path, cache: Path) -> None:
    """In step 2 of the first: it ends with code 7 on both ranks; no row, no checkpoint of it comes after the claim."""
    config = runs.write_config(tmp_path, cache, checkpoint={"every": 1})
    ends = ranks(2, taken_over, config=str(config), folder=str(tmp_path / "run"))
    assert [end.code for end in ends] == [7, 7], ends
    assert "another attempt has taken over" in ends[0].err and not ends[1].err
    assert [row["step"] for row in runs.rows(tmp_path)] == [0, 1]
    assert [p.name for p in complete_folders(tmp_path / "run/checkpoints")] == ["step_0000001"]


def taken_over(config: str, folder: str) -> Any:
    """On a rank: a run whose folder another attempt claims in step 2, after the step's work."""
    from megatron_refine.run.session import Session

    train_step = Session.train_step

    def observed(self: Any, refine: bool) -> Any:
        metrics = train_step(self, refine)
        if self.progress.step == 2 and self.ranks.is_main:
            attempt(Path(folder), pid=0).claim()
        return metrics

    Session.train_step = observed  # type: ignore[method-assign]
    return runs.command(["--config", config, *runs.TP2])


def two_ranks(code: str, config: Path) -> tuple[list[int], list[str]]:
    """Exit codes and errors of two processes that run `code`; each on its own, as under SLURM."""
    line = [sys.executable, "-c", code, "--config", str(config), *runs.TP2]
    with reserve_port("127.0.0.1") as held:
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(held.getsockname()[1]), "WORLD_SIZE": "2"}
        places = [os.environ | common | {"RANK": r, "LOCAL_RANK": r} for r in "01"]
        started = [
            subprocess.Popen(line, cwd=ROOT, env=place, stderr=subprocess.PIPE, encoding="utf-8") for place in places
        ]
        texts = [process.communicate(timeout=DEADLINE)[1] for process in started]
    return [process.returncode for process in started], texts


def hanging(config: str) -> int:
    """On a rank: the training command, in which rank 1 sleeps in step 2; its deadline is then three seconds."""
    from megatron_refine import train
    from megatron_refine.run.session import Session

    step = Session.train_step

    def late(self: Any, refine: bool) -> Any:
        if self.progress.step == 1 and os.environ["RANK"] == "1":
            self.watch.seconds = 3.0
            time.sleep(DEADLINE)
        return step(self, refine)

    Session.train_step = late  # type: ignore[method-assign]
    return train.main(["--config", config, *runs.TP2])


def test_a_rank_that_hangs_is_named_and_ended(ranks: Any, tmp_path: Path, cache: Path) -> None:
    """It passes the deadline of the phase, says where it stands and ends with code 8."""
    with pytest.raises(RankError) as error:
        ranks(2, hanging, config=str(runs.write_config(tmp_path, cache)))
    said = str(error.value)
    assert "rank 1 of 2 failed first: left with exit status 8" in said
    assert re.search(r"rank 1 on .*, phase step.*run\.phase_minutes=0\.05; ended", said)
    assert "in late" in said  # the stack says where


def test_the_end_of_the_jobs_time_is_a_reason_to_stop(ranks: Any, tmp_path: Path, cache: Path) -> None:
    """The next step and save would not be done a minute before it."""
    config = runs.write_config(tmp_path, cache, run={"reserve_minutes": 1.0})
    ends = ranks(1, with_end_time, config=str(config), seconds=61.0)
    assert ends[0].code == 75 and "stopped by the end of the job's time after step" in ends[0].out
    rows = runs.rows(tmp_path)
    assert 1 <= rows[-1]["step"] < 6
    assert (tmp_path / f"run/checkpoints/step_{rows[-1]['step']:07d}/COMPLETE").exists()


def with_end_time(config: str, seconds: float) -> Any:
    os.environ["SLURM_JOB_END_TIME"] = str(int(time.time() + seconds))
    return runs.command(["--config", config])


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_where_that_is_allowed(ranks: Any, tmp_path: Path, cache: Path) -> None:
    """The run from the one before it is the run that was never damaged."""
    config = runs.write_config(tmp_path, cache, train={"steps": 4}, checkpoint={"every": 1, "keep": 3})
    job = functools.partial(ranks, 2, runs.command, arguments=["--config", str(config), *runs.TP2])
    assert [end.code for end in job()] == [0, 0]
    whole, root = runs.rows(tmp_path), tmp_path / "run/checkpoints"
    shutil.rmtree(root / "step_0000004")
    damaged = next((root / "step_0000003").glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    refused = job()
    assert [end.code for end in refused] == [4, 4] and f"{damaged.name}: truncated" in refused[0].err, refused
    ends = job(arguments=["--config", str(config), *runs.TP2, "checkpoint.fallback=true"])
    assert [end.code for end in ends] == [0, 0]
    assert "checkpoint.fallback: going on from step_0000002" in ends[0].out and "step 2/4" in ends[0].out
    assert runs.rows(tmp_path) == whole


def test_the_owner_is_written_as_json(tmp_path: Path) -> None:
    owner = attempt(tmp_path, job="12", restart=3)
    owner.claim()
    assert json.loads((tmp_path / "OWNER").read_text(encoding="utf-8")) == owner.token
    assert owner.name.startswith("12-3-") and not list(tmp_path.glob(".OWNER-*"))


def test_the_longest_of_each_phase_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is reserved before the end of a job."""
    watch, now = Watchdog(60.0), 0.0
    monkeypatch.setattr("megatron_refine.run.watchdog.time.monotonic", lambda: now)
    for phase, seconds in (("step", 5.0), ("save", 3.0), ("step", 2.0)):
        with watch(phase):
            now += seconds
    assert watch.longest == {"step": 5.0, "save": 3.0}


def test_an_attempt_that_comes_too_late_is_fenced_at_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And says so by its kind, which decides the exit code."""
    job = {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "0"}
    monkeypatch.setattr(os, "environ", os.environ | job)
    config = load(str(runs.write_config(tmp_path, tmp_path / "data")), [], FAMILIES)
    Path(config.run.dir).mkdir()
    attempt(Path(config.run.dir), job="12", restart=1).claim()
    found = opening._prepare(config)
    assert found["error"] == "FencedError" and "job 12, restart 1" in str(found["message"]), found


@pytest.mark.slow
def test_a_lost_rank_ends_the_others_with_their_own_code(tmp_path: Path, cache: Path) -> None:
    """SIGKILL of rank 1 in step 3: rank 0 says what it lost and where it stood."""
    config = runs.write_config(tmp_path, cache)
    code = (
        "import sys; from tests import runs; from megatron_refine.step.refine import RefineStep\n"
        "from megatron_refine import train; runs._fault = runs.Fault(3, 9, rank=1)\n"
        "RefineStep.explore_wave = runs._observed(RefineStep.explore_wave, None); sys.exit(train.main())\n"
    )
    codes, texts = two_ranks(code, config)
    assert codes == [8, -9], texts
    last = texts[0].strip().splitlines()[-1]
    assert last.startswith("rank 0 on ") and "phase step (" in last and "lost another rank" in last


def of_the_second_rank() -> list[str]:
    """On a rank: what each is told of a file that one of them lacks; then what all of them have."""

    def action() -> str:
        if rank == 1:
            raise ConfigError("data.paths: no such file")
        return "rows"

    rank = int(os.environ["RANK"])
    with pytest.raises(ConfigError) as told:
        opening.everywhere(action)
    return [str(told.value), opening.everywhere(lambda: "rows")]


def test_what_one_rank_lacks_all_are_told(ranks: Any) -> None:
    assert ranks(2, of_the_second_rank, 60) == [["data.paths: no such file (rank 1)", "rows"]] * 2
