"""What users and disks do to a run: the documented exit code and one clear line, damaged checkpoints by file."""

import ast
import functools
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_refine.config import Config, load
from megatron_refine.models.family import FAMILIES
from megatron_refine.platform.megatron.version import since
from tests import runs
from tests.lanes import short
from tests.runs import TP2, End, Fault

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: Any) -> Path:
    """The packed text, shared by all runs."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def finished(ranks: Any, cache: Path, tmp_path_factory: Any) -> Path:
    """The run folder of two steps with a checkpoint each, at tp2."""
    folder = tmp_path_factory.mktemp("finished")
    config = runs.write_config(folder, cache, train={"steps": 2}, checkpoint={"every": 1})
    assert [end.code for end in ranks(2, runs.command, arguments=["--config", str(config), *TP2])] == [0, 0]
    return folder / "run"


def check_refused(end: End, code: int, pattern: str) -> None:
    """The exit code, and one line that matches."""
    assert end.code == code, end.err
    assert len(end.err.splitlines()) == 1, end.err
    assert re.search(pattern, end.err), end.err


@pytest.mark.parametrize(
    "overrides, world, pattern",
    [
        (["model.hiden_size=64"], 1, r"run\.yaml: model\.hiden_size: unknown key; did you mean model\.hidden_size\?"),
        (["parallel.tp=2"], 3, r"world size 3 is no multiple of tp\*cp\*pp = 2\*1\*1 = 2: start a multiple of 2 "),
        (["parallel.tp=2"], 6, r"train\.global_batch_size=4 is no multiple of dp\*train\.micro_batch_size = 3\*2"),
    ],
    ids=["unknown key", "ranks for the layout", "ranks for the batch"],
)
def test_a_wrong_configuration_is_refused_before_torch_is_imported(
    tmp_path: Path, overrides: list[str], world: int, pattern: str
) -> None:
    config = runs.write_config(tmp_path, tmp_path / "cache")
    code = "import sys; from megatron_refine.train import main; code = main(); print('torch' in sys.modules, code)"
    errors = []
    for rank in range(2):
        variables = {"RANK": str(rank), "WORLD_SIZE": str(world), "PATH": ""}
        arguments = [sys.executable, "-c", code, "--config", str(config), *overrides]
        done = subprocess.run(arguments, cwd=ROOT, env=variables, capture_output=True, encoding="utf-8")
        assert done.stdout == "False 2\n", done.stderr
        errors.append(done.stderr)
    check_refused(End(2, "", errors[0]), 2, pattern)
    assert errors[1] == "", "the main rank speaks for all"
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize(
    "path, pattern",
    [
        ("nothing", r"data\.paths: .*nothing: the folder holds no files; name one that does"),
        ("missing.txt", r"data\.paths: .*missing\.txt: no such file or folder; correct the path"),
        (ast.__file__, r"data\.paths: no document is long enough: the longest has \d+ tokens, a row needs 99999;"),
    ],
    ids=["empty folder", "no file", "short documents"],
)
def test_text_that_cannot_be_used(ranks: Any, tmp_path: Path, path: str, pattern: str) -> None:
    (tmp_path / "nothing").mkdir()
    data = {"paths": [str(tmp_path / path)], "valid_paths": [], "seq_length": 99999}
    config = runs.write_config(tmp_path, tmp_path / "cache", data=data)
    check_refused(ranks(1, runs.command, arguments=["--config", str(config)])[0], 2, pattern)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


@pytest.fixture
def again(ranks: Any, tmp_path: Path, cache: Path, finished: Path) -> Callable[..., End]:
    """Runs the finished run of `tmp_path/run` again, with overrides, at tp1."""
    shutil.copytree(finished, tmp_path / "run")
    config = runs.write_config(tmp_path, cache, train={"steps": 3}, checkpoint={"every": 1})
    return lambda *own: ranks(1, runs.command, arguments=["--config", str(config), *own], saves=False)[0]


def test_a_checkpoint_of_another_model(again: Callable[..., End]) -> None:
    pattern = r"run\.dir=.*/run: has another model; set model\.intermediate_size=128, or choose a new run\.dir"
    check_refused(again("model.intermediate_size=256"), 2, pattern)


def test_other_data_than_the_run_began_with(again: Callable[..., End], tmp_path: Path) -> None:
    pattern = r"step_0000002: the run was trained on other data .*restore data\.\*, .*or choose a new run\.dir"
    before = (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8")
    check_refused(again("data.seq_length=160"), 2, pattern)
    assert (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8") == before


def test_a_damaged_checkpoint_and_its_remedy(again: Callable[..., End], tmp_path: Path) -> None:
    newest = tmp_path / "run/checkpoints/step_0000002"
    file = newest / "__0_0.distcp"
    flip_bit(file)
    pattern = rf"{file}: damaged: sha256 differs; delete {newest} to go back to step_0000001"
    check_refused(again(), 4, pattern)
    shutil.rmtree(newest)
    end = again()
    assert end.code == 0 and "step 1/3" in runs.first_line(end)


def test_a_checkpoint_to_start_from_that_is_not_there(ranks: Any, tmp_path: Path, cache: Path) -> None:
    config = runs.write_config(tmp_path, cache, checkpoint={"load": str(tmp_path / "elsewhere")})
    end = ranks(1, runs.command, arguments=["--config", str(config)])[0]
    pattern = rf"checkpoint\.load={tmp_path}/elsewhere: no such folder; name a run, a checkpoint or a folder in "
    check_refused(end, 2, pattern)


def test_a_run_folder_that_cannot_be_written(ranks: Any, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "file").write_text("in the way of the run folder", encoding="utf-8")
    config = runs.write_config(tmp_path, cache, run={"dir": str(tmp_path / "file" / "run")})
    check_refused(ranks(1, runs.command, arguments=["--config", str(config)])[0], 2, rf"run\.dir.*{tmp_path}/file")


@pytest.mark.parametrize("broken", short(["gather", "format file", "weights"], lambda broken: broken == "weights"))
def test_a_rank_that_fails_alone_inside_megatron_ends_the_run(
    ranks: Any, tmp_path: Path, cache: Path, finished: Path, broken: str
) -> None:
    """One rank's disk is full in the middle of a save: the screen says so, no rank waits, the run can go on.

    The others only see that it is gone.
    """
    shutil.copytree(finished, tmp_path / "run")
    config = runs.write_config(tmp_path, cache, train={"steps": 3}, checkpoint={"every": 1})
    job = functools.partial(ranks, 2, runs.command, arguments=["--config", str(config), *TP2])
    ends = job(broken=broken)
    assert 4 in (codes := {end.code for end in ends}) and codes <= {4, 8}
    assert all("lost another rank" in end.err for end in ends if end.code == 8)
    assert not any("Traceback" in end.err for end in ends), ends  # Megatron may log a line of its own
    cause = rf"step_0000003: {'gather' if broken == 'gather' else 'save'} failed: .*(No space left|Worker failure).*"
    assert re.search(cause + "earlier checkpoints are intact", "".join(end.err for end in ends))
    assert [end.code for end in job(saves=False)] == [0, 0]


def test_losses_that_are_not_finite_stop_the_run(ranks: Any, tmp_path: Path, cache: Path) -> None:
    """From step 2 on: two steps are skipped, the third stops the run; it goes on when the cause is gone."""
    train = {"steps": 5, "max_skipped_steps": 2}
    config = runs.write_config(tmp_path, cache, train=train, checkpoint={"every": 1})
    end = ranks(1, runs.command, arguments=["--config", str(config)], fault=Fault(2))[0]
    check_refused(end, 3, r"not finite in 3 steps in a row .*are intact: run again with a lower optimizer\.lr")
    rows = runs.rows(tmp_path)
    assert [row.get("train/optimizer_steps") for row in rows] == [None, 1, 0, 0]
    assert rows[2]["train/loss"] is None and " loss nan " in end.out
    assert {p.name for p in (tmp_path / "run/checkpoints").iterdir()} == {"step_0000002", "step_0000003", "latest"}
    end = ranks(1, runs.command, arguments=["--config", str(config)], saves=False)[0]
    assert end.code == 0 and "step 3/5" in runs.first_line(end)
    assert [row["train/optimizer_steps"] for row in runs.rows(tmp_path)[4:]] == [1, 1]


def test_a_first_step_that_is_not_finite_is_no_reason_to_fail(ranks: Any, tmp_path: Path, cache: Path) -> None:
    """A checkpoint is due before Adam has made any step; with it, the run goes on as without."""
    config = runs.write_config(tmp_path, cache, train={"steps": 3, "max_skipped_steps": 1}, checkpoint={"every": 1})
    job = functools.partial(ranks, 1, runs.command, arguments=["--config", str(config)])
    check_refused(job(fault=Fault(1))[0], 3, r"not finite in 2 steps in a row")
    end = job(saves=False)[0]
    assert end.code == 0 and "step 1/3" in runs.first_line(end)
    rows = runs.rows(tmp_path)
    shutil.rmtree(tmp_path / "run")
    assert job(fault=Fault(1, until=1), saves=False)[0].code == 0
    assert runs.rows(tmp_path) == rows


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    where = random.Random(path.name).randrange(8 * len(data))
    data[where // 8] ^= 1 << where % 8
    path.write_bytes(data)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, Callable[[Path], None]] = {"flipped": flip_bit, "truncated": halve, "removed": Path.unlink}


def damaged_copies(folder: Path) -> Iterator[tuple[str, str]]:
    """(what was done, file name); `folder` is damaged meanwhile and whole again afterwards."""
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        whole = path.read_bytes()
        for kind, damage in DAMAGES.items():
            damage(path)
            yield kind, path.name
            path.write_bytes(whole)
    (folder / "extra").write_text("extra", encoding="utf-8")
    yield "added", "extra"
    (folder / "extra").unlink()
    manifest = folder / "manifest.json"
    whole = manifest.read_bytes()
    manifest.write_text(json.dumps(json.loads(whole) | {"step": 7}), encoding="utf-8")
    yield "altered", "manifest.json"
    manifest.write_bytes(whole)


def messages_of_damage(config: Config, folder: Path) -> list[tuple[str, str, str]]:
    """On a rank: (damage, file, the CheckpointError of loading it)."""
    import torch.distributed as dist

    from megatron_refine.checkpoint.checkpoints import Checkpoints
    from megatron_refine.errors import CheckpointError
    from megatron_refine.trainer.parallel import init_parallel

    checkpoints = Checkpoints(folder.parent, config, init_parallel(config))
    found: list[tuple[str, str, str]] = []
    copies = damaged_copies(folder) if checkpoints.ranks.is_main else iter(())
    while True:
        done = [next(copies, None)]
        dist.broadcast_object_list(done, 0)
        if done[0] is None:
            return found
        with pytest.raises(CheckpointError) as error:
            checkpoints.load(folder, None)  # type: ignore[arg-type]  # it must not get as far as the optimizer
        dist.barrier()
        found.append((*done[0], str(error.value)))


def test_every_damage_is_named_on_every_rank(ranks: Any, tmp_path: Path, cache: Path, finished: Path) -> None:
    folder = tmp_path / "checkpoints" / "step_0000002"
    shutil.copytree(finished / "checkpoints", folder.parent)
    names = sorted(p.name for p in folder.iterdir())
    common = set() if since(0, 17) else {"common.pt"}
    assert {".metadata", "COMPLETE", "manifest.json", "__0_0.distcp", "__1_0.distcp"} | common <= set(names)
    config = load(runs.write_config(tmp_path, cache), list(TP2), FAMILIES)
    found, other = ranks(2, messages_of_damage, config=config, folder=folder)
    assert found == other
    assert [(kind, name) for kind, name, _ in found[:-2]] == [(kind, name) for name in names for kind in DAMAGES]
    words = {"flipped": "damaged", "truncated": "truncated|damaged", "removed": "missing|not a complete checkpoint"}
    words |= {"added": "not in the manifest", "altered": "damaged: does not match COMPLETE"}
    for kind, name, message in found:
        assert name in message and re.search(words[kind], message), (kind, message)
        if not (kind == "removed" and name in ("COMPLETE", "manifest.json")):
            assert f"delete {folder} to go back to step_0000001" in message, (kind, message)
