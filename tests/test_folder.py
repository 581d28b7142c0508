"""The run folder: what each attempt was, and Weights & Biases, the real package without a network."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_refine.report import history, tracking
from megatron_refine.report.folder import RunFolder
from tests import runs
from tests.parity import small_config

ROOT = Path(__file__).parents[1]
ROW = {"step": 1, "train/loss": 2.0, "perf/tokens_per_sec": 10.0, "time/step": 1.0}
needs_wandb = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="needs wandb: pip install megatron-refine[wandb]"
)
# Two attempts at a run of a user without a name, as in a container; in the second wandb's own process is killed.
ATTEMPTS = """
import os, pwd, signal, sys
def nameless(uid): raise KeyError(uid)
pwd.getpwuid = nameless
from pathlib import Path
from megatron_refine.config import load
from megatron_refine.models.family import FAMILIES
from megatron_refine.report import tracking
from megatron_refine.report.folder import RunFolder
config = load(sys.argv[1], ["run.wandb=offline", "run.wandb_tags=[a, b]", f"run.dir={sys.argv[2]}"], FAMILIES)
Path(config.run.dir).mkdir(exist_ok=True)
tracking.check(config)
for attempt in range(2):
    folder = RunFolder(config, attempt, 10, lambda line: print(line, flush=True))
    for step in range(1, 4):
        if attempt and step == 2:
            for pid in open(f"/proc/self/task/{os.getpid()}/children").read().split():
                if b"wandb-core" in open(f"/proc/{pid}/cmdline", "rb").read():
                    os.kill(int(pid), signal.SIGKILL); os.waitpid(int(pid), 0)
        folder.record({"step": step, "train/loss": 2.0, "perf/tokens_per_sec": 10.0, "time/step": 1.0})
    folder.close(0)
"""


@needs_wandb
def test_wandb_offline_without_a_home_and_without_its_process(tmp_path: Path) -> None:
    """Whole files in the run's folder, one identity for all attempts; its end is one line and the run's rows go on."""
    small_config(tmp_path)
    run = tmp_path / "run"
    environment = {k: v for k, v in os.environ.items() if k != "HOME"} | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", ATTEMPTS, str(tmp_path / "small.yaml"), str(run)]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", timeout=100)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    said = [line for line in done.stdout.splitlines() if not line.startswith("step ")]
    assert len(said) == 1 and said[0].endswith(
        "from here on this attempt is not logged there, metrics.jsonl has all of it"
    )
    assert len((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 1 + 3
    identity = json.loads((run / "wandb.json").read_text(encoding="utf-8"))["id"]
    assert {path.name for path in (run / "wandb").glob("offline-run-*/*.wandb")} == {f"run-{identity}.wandb"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "small.yaml"]


@needs_wandb
def test_wandb_online_without_a_key_is_refused_before_anything_long(ranks: Any, tmp_path: Path) -> None:
    config = runs.write_config(tmp_path, tmp_path / "data")
    end = ranks(1, without_key, config=str(config), home=str(tmp_path))[0]
    assert end.code == 2
    assert end.err == (
        "run.wandb=online: there is no API key: set WANDB_API_KEY, run `wandb login`, or set run.wandb=offline\n"
    )
    assert not (tmp_path / "data").exists()


def without_key(config: str, home: str) -> Any:
    os.environ.pop("WANDB_API_KEY", None)
    os.environ |= {"HOME": home, "NETRC": f"{home}/none"}
    return runs.command(["--config", config, "run.wandb=online"])


class Wandb(SimpleNamespace):
    """The package as it behaves with a server: what `login` raises, what `init` was called with."""

    Error = RuntimeError
    Settings = staticmethod(lambda **settings: settings)

    def __init__(self, refusal: str = ""):
        super().__init__(refusal=refusal, calls=[], rows=[], setup=lambda settings: None)

    def login(self, **_: Any) -> bool:
        if self.refusal:
            raise RuntimeError(self.refusal)
        return True

    def init(self, **arguments: Any) -> Any:
        self.calls.append(arguments)
        return SimpleNamespace(
            url="https://wandb/run", log=self.rows.append, finish=lambda exit_code: self.rows.append(exit_code),
            define_metric=lambda *_, **__: None,
        )  # fmt: skip


def test_wandb_online_is_told_what_the_run_is(tmp_path: Path, monkeypatch: Any) -> None:
    """Project, entity, group, tags; one identity for all attempts; the exit code at the end."""
    package, shown = Wandb(), list[str]()
    monkeypatch.setitem(sys.modules, "wandb", package)
    names = ("run.wandb_project=p", "run.wandb_entity=e", "run.wandb_group=g", "run.wandb_tags=[a, b]")
    config = small_config(tmp_path, "run.wandb=online", *names)
    tracking.check(config)
    for _ in range(2):
        folder = RunFolder(config, 0, 10, shown.append)
        folder.record(ROW)
        folder.close(75)
    first, second = package.calls
    assert {k: first[k] for k in ("project", "entity", "group", "tags", "mode", "resume")} == {
        "project": "p", "entity": "e", "group": "g", "tags": ["a", "b"], "mode": "online", "resume": "allow",
    }  # fmt: skip
    assert first["id"] == second["id"] and first["config"]["model"]["num_heads"] == 4
    assert [row if isinstance(row, int) else row["step"] for row in package.rows] == [1, 75, 1, 75]
    assert shown[0] == "wandb: https://wandb/run"


def test_a_refused_key_is_an_error_and_a_silent_server_is_none(tmp_path: Path, monkeypatch: Any) -> None:
    config, shown = small_config(tmp_path, "run.wandb=online"), list[str]()
    monkeypatch.setattr(tracking, "_unreachable", "")
    monkeypatch.setitem(sys.modules, "wandb", Wandb("user is not logged in"))
    with pytest.raises(ValueError, match="run.wandb=online: the API key is refused: .*; set WANDB_API_KEY, run"):
        tracking.check(config)
    package = Wandb("dial tcp: no such host")
    monkeypatch.setitem(sys.modules, "wandb", package)
    tracking.check(config)
    RunFolder(config, 0, 10, shown.append).record(ROW)
    assert package.calls[0]["mode"] == "offline" and len(package.rows) == 1
    assert "no such host; this attempt is logged offline: send it with `wandb sync " in shown[0]


def test_settings_and_keys_that_cannot_be_read_are_a_line(tmp_path: Path, monkeypatch: Any) -> None:
    """A key with a blank at its end; a .netrc that is no text."""
    config, package = small_config(tmp_path, "run.wandb=online"), Wandb()
    monkeypatch.setitem(sys.modules, "wandb", package)

    def fails(*_: Any, **__: Any) -> Any:
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")

    for name, words in (("login", "the API key cannot be read: "), ("setup", "its settings are refused: ")):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=f"run.wandb=online: {words}.*; set WANDB"):
            patch.setattr(package, name, fails, raising=False)
            tracking.check(config)


def test_a_finished_run_is_compared_with_a_baseline(tmp_path: Path) -> None:
    """On the screen and in the report: the baseline's evaluation after as many steps, not its later one."""
    other, shown = tmp_path / "ntp", list[str]()
    other.mkdir()
    evaluations = [{"step": step, "eval/ntp_loss": loss} for step, loss in ((0, 6.0), (2, 4.125), (3, 3.0))]
    (other / "metrics.jsonl").write_text("\n".join(map(json.dumps, evaluations)), encoding="utf-8")
    folder = RunFolder(small_config(tmp_path, f"run.baseline={other}"), 0, 2, shown.append)
    folder.record({"step": 0, "eval/ntp_loss": 6.0})
    folder.record(ROW | {"step": 2, "eval/ntp_loss": 5.0})
    folder.finish()
    rows = [line.split()[:3] for line in "\n".join(shown).splitlines() if line.startswith(("after", "baseline"))]
    assert rows == [["after", "NTP", "2"], ["baseline", "2", "4.125"]]
    assert ">4.125<" in (folder.path / "report.html").read_text(encoding="utf-8")


def test_the_time_left_is_that_of_the_steps_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the mean of the last steps: ten seconds each, though the evaluation before the first took a minute."""
    now, shown = 1000.0, list[str]()
    monkeypatch.setattr("megatron_refine.report.folder.time.time", lambda: now)
    folder = RunFolder(small_config(tmp_path), 0, 8, shown.append)
    for step, now in enumerate((1060.0, 1070.0, 1080.0), 1):  # noqa: B007
        folder.record(ROW | {"step": step})
    assert [line.partition("left ")[2] for line in shown] == ["", "60s", "50s"]


def test_the_commit_is_that_of_the_projects_own_working_copy(tmp_path: Path) -> None:
    """None where there is no git, and for a package that is installed inside someone else's working copy."""

    def git(*words: str) -> None:
        author = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *author, *words], cwd=tmp_path, check=True, capture_output=True)

    assert history.commit(tmp_path) is None
    git("init")
    git("commit", "--allow-empty", "-m", "first")
    (tmp_path / "file").write_text("1", encoding="utf-8")
    git("add", "file")
    found = history.commit(tmp_path)
    assert found and len(found) == 40 + len("-dirty") and found.endswith("-dirty")
    (tmp_path / "inner").mkdir()
    assert history.commit(tmp_path / "inner") is None
