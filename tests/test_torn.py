"""What a power cut tears and a full disk leaves out: passed over with a line or refused by name, with code 4."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_refine import files
from megatron_refine.config import load
from megatron_refine.engine.errors import EngineError
from megatron_refine.errors import CheckpointError
from megatron_refine.files import Appended, TornError, read_rows
from megatron_refine.models.family import FAMILIES
from megatron_refine.report.folder import Predictions, RunFolder, read_progress
from megatron_refine.report.html import write_report
from megatron_refine.report.metrics import MetricsLog, read
from megatron_refine.run import opening
from megatron_refine.run.exits import ending_of
from tests import runs
from tests.parity import small_config

ROOT = Path(__file__).parents[1]
TORN = {"empty": b"", "zeros": b"\0" * 512, "cut": b'{"step": 3, "entr', "no text": b"\xff\xfe\x00", "a list": b"[1]"}


def test_the_light_modules_import_neither_torch_nor_megatron() -> None:
    code = (
        "import sys, megatron_refine.errors; from megatron_refine.checkpoint import ownership, manifest, pickles\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('torch', 'megatron', 'numpy')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.stdout == "[]\n", done.stderr


def test_rows_of_a_file_that_was_torn(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    for torn in ('{"step": 3, "lo', "\0" * 300, '{"step": 3', '{"step": \n', "null\n"):
        path.write_text('{"step": 1}\n{"step": 2}\n' + torn, encoding="utf-8")
        assert read_rows(path) == [{"step": 1}, {"step": 2}], torn
    path.write_text('{"step": 1}\n' + "\0" * 300 + '{"step": 3}\n', encoding="utf-8")  # appended to after a power cut
    assert read_rows(path) == [{"step": 1}, {"step": 3}]
    for torn in ("{", "[1]", "3", "nan", "[" * 20000):
        path.write_text(f'{{"step": 1}}\n{torn}\n{{"step": 3}}\n', encoding="utf-8")
        with pytest.raises(TornError, match=rf"{path}:2: not a row: damaged.*; remove this line"):
            read_rows(path)
    path.write_text('{"step": 1}\n{"st\n{"step": 3', encoding="utf-8")
    with pytest.raises(TornError, match="rows.jsonl:2: not a row"):
        read_rows(path)
    path.write_bytes(b'{"step": 1}\n\xff\n')
    with pytest.raises(TornError, match="not UTF-8 text"):
        read_rows(path)


@pytest.mark.parametrize("row", ["{}", '{"step": null}', '{"step": "3"}'])
def test_a_row_without_its_step(tmp_path: Path, row: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{row}\n{{"step": 3}}\n', encoding="utf-8")
    with pytest.raises(TornError, match=r"metrics\.jsonl: damaged: .* is not a row of metrics; remove this line"):
        read(path)


def test_a_resumed_run_writes_on_after_torn_rows(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("metrics.jsonl", "predictions.jsonl"):
        (run / name).write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n' + "\0" * 100, encoding="utf-8")
    folder = RunFolder(small_config(tmp_path), 2, 10, str)
    folder.record({"step": 3})
    folder.predictions.append(3, [{"answer": "é"}])
    assert [row["step"] for row in read(run / "metrics.jsonl")] == [1, 2, 3]
    assert folder.predictions.read()[-1] == {"step": 3, "answer": "é"}
    (run / "predictions.jsonl").write_text('{"step": 1}\n}\n{"step": 3}\n', encoding="utf-8")
    with pytest.raises(TornError, match=r"predictions\.jsonl:2: "):
        Predictions(run / "predictions.jsonl", 2)


@pytest.mark.parametrize("content", TORN.values(), ids=TORN)
def test_a_torn_sample_costs_the_report_its_sample_alone(tmp_path: Path, content: bytes) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1, "train/loss": 2.0, "time/step": 1.0})
    (tmp_path / "samples.json").write_bytes(content)
    (tmp_path / "config.yaml").write_bytes(b"run: \xff\xfe")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert page.count(f"{tmp_path}/samples.json: damaged: ") == 2 and "NTP loss" in page


@pytest.mark.parametrize("content", [*TORN.values(), b'{"step": 3}', b"3"])
def test_a_torn_progress_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "progress.json").write_bytes(content)
    with pytest.raises(TornError, match=rf"{tmp_path}/progress\.json: damaged: .*; delete it or restore it") as error:
        read_progress(tmp_path)
    assert ending_of(error.value, "", speaks=True) == (4, str(error.value))
    assert read_progress(tmp_path / "nothing") is None


def test_a_disk_that_fails_has_its_line_and_its_code() -> None:
    for number, remedy in ((errno.ENOSPC, "make room"), (errno.EDQUOT, "make room"), (errno.EIO, "mend it")):
        error = OSError(number, os.strerror(number), "run/metrics.jsonl")
        code, line = ending_of(error, "rank 0", speaks=False) or (0, "")
        assert code == 4 and line == (
            f"run/metrics.jsonl: {os.strerror(number)}; earlier checkpoints are intact: {remedy} and run the same "
            "command again"
        )
    assert ending_of(ConnectionResetError(104, "reset"), "", True) is None
    assert (ending_of(EngineError("gone"), "", True) or (0,))[0] == 5


def test_what_is_appended_names_its_file_and_stays_whole(tmp_path: Path) -> None:
    file = Appended(tmp_path / "new" / "log")
    file.write("a\n")
    os.dup2(full := os.open("/dev/full", os.O_WRONLY), file._file.fileno())
    os.close(full)
    with pytest.raises(OSError, match="No space left") as error:
        file.write("b\n")
    assert error.value.filename == str(tmp_path / "new" / "log")
    file.close()  # keeps nothing back that would be written now
    assert (tmp_path / "new" / "log").read_text(encoding="utf-8") == "a\n"


def test_what_is_appended_in_parts_is_whole(tmp_path: Path) -> None:
    """The system may take less than it is given, as on a disk that is nearly full."""
    file, taken = Appended(tmp_path / "log"), bytearray()

    class Slow:
        def write(self, rest: memoryview) -> int:
            taken.extend(rest[:2])
            return len(rest[:2])

    file._file.close()
    file._file = Slow()  # type: ignore[assignment]
    file.write("a line\n")
    assert taken == b"a line\n"


def test_a_small_file_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "OWNER"
    files.write(path, "old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")  # as fsync says it: without a name

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        files.write(path, "new")
    assert error.value.filename == str(path)
    assert [(p.name, p.read_text(encoding="utf-8")) for p in tmp_path.iterdir()] == [("OWNER", "old")]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB with nothing free."""
    with runs.small_disk(tmp_path / "disk", "64k") as folder:
        with (folder / "fill").open("wb", buffering=0) as file:
            while shutil.disk_usage(folder).free:
                file.write(bytes(4096))
        yield folder


def test_a_run_is_not_begun_on_a_full_disk(small_disk: Path) -> None:
    with pytest.raises(CheckpointError, match=r"disk: No space left on device; .*make room"):
        opening._check_writable(small_disk)
    (small_disk / "run").mkdir()
    with pytest.raises(CheckpointError, match="No space left on device"):
        opening._check_writable(small_disk / "run")
    assert not list((small_disk / "run").iterdir())


def test_what_fails_in_the_opening_fails_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(tmp_path)

    def full(self: Any, say: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "run/OWNER")

    monkeypatch.setattr(opening.Sources, "of", lambda config, say: None)
    monkeypatch.setattr(opening.preflight, "check", lambda config: None)
    monkeypatch.setattr(opening.Ownership, "claim", full)
    assert opening._prepare(config) == {
        "error": "CheckpointError",
        "message": "run/OWNER: No space left on device; earlier checkpoints are intact: make room and run the same "
        "command again",
    }


def test_a_full_disk_is_code_4_before_the_first_step_too(small_disk: Path, tmp_path: Path) -> None:
    """That of the cache of rows, with nothing free and with room for a part; in `prepare` and in a run."""
    path = runs.write_config(tmp_path, small_disk / "cache")
    for free in (0, 16384):
        with (small_disk / "fill").open("rb+") as file:
            file.truncate((64 << 10) - free)
        command = [sys.executable, "-m", "megatron_refine", "prepare", "--config", str(path)]
        done = subprocess.run(command, capture_output=True, encoding="utf-8")
        assert done.returncode == 4 and done.stderr.count("\n") == 1, done.stderr
        assert "No space left on device; make room and run the same command again" in done.stderr
        found = opening._prepare(load([str(path)], [], FAMILIES))
        assert found["error"] == "CheckpointError" and "cache: No space left on device; " in str(found["message"])


def test_a_torn_owner_is_passed_over_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(opening.Sources, "of", lambda config, say: None)
    monkeypatch.setattr(opening.preflight, "check", lambda config: None)
    for content in TORN.values():
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run/OWNER").write_bytes(content)
        token = opening._prepare(small_config(tmp_path))["token"]
        assert json.loads((tmp_path / "run/OWNER").read_text(encoding="utf-8")) == token
        line = capsys.readouterr().out
        assert line.startswith(f"{tmp_path}/run/OWNER: damaged: ") and line.endswith("; passed over: this attempt "
                                                                                     "claims the folder\n")  # fmt: skip


def filled(config: str, what: str) -> Any:
    """On a rank: a run whose disk is full from step 2 on, for one of its files."""
    from megatron_refine.run.session import Session

    train_step = Session.train_step

    def observed(self: Any, refine: bool) -> Any:
        if self.progress.step == 1 and self.folder:
            files: dict[str, Callable[[], Any]] = {
                "metrics.jsonl": lambda: self.folder.metrics._file, "train.log": lambda: self.folder._log,
            }  # fmt: skip
            os.dup2(os.open("/dev/full", os.O_WRONLY), files[what]()._file.fileno())
        return train_step(self, refine)

    Session.train_step = observed  # type: ignore[method-assign]
    return runs.command(["--config", config], saves=False)


@pytest.mark.parametrize("what", ["metrics.jsonl", "train.log"])
def test_a_disk_that_gets_full_in_the_middle_ends_the_run_in_one_line(
    ranks: Any, tmp_path: Path, tmp_path_factory: Any, what: str
) -> None:
    cache = tmp_path_factory.getbasetemp() / "torn-cache"
    config = runs.write_config(tmp_path, cache, refine={"enabled": False}, train={"steps": 3})
    end = ranks(1, filled, config=str(config), what=what)[0]
    assert end.code == 4, end
    assert len(end.err.splitlines()) == 1 and f"{what}: No space left on device; earlier checkpoints" in end.err, end
    steps = [row["step"] for row in read(tmp_path / "run/metrics.jsonl")]
    assert steps == ([0, 1] if what == "metrics.jsonl" else [0, 1, 2])


def test_two_machines_write_beside_a_file_under_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of the same number, as containers have."""
    names = set()
    for host in ("node1", "node2"):
        monkeypatch.setattr(files.socket, "gethostname", lambda host=host: host)
        names.add(files.temporary(tmp_path / "config.yaml"))
    assert len(names) == 2 and all(path.parent == tmp_path and path.name.startswith(".") for path in names)


def test_answers_are_on_the_disk_before_the_progress_that_counts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (synced.append(os.readlink(f"/proc/self/fd/{handle}")), real(handle))[1]
    )
    Predictions(tmp_path / "predictions.jsonl", 0).append(1, [{"index": 0}])
    assert synced[-1] == str(tmp_path / "predictions.jsonl")
