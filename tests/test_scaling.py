"""Scaling sweeps: their points, real runs of one, two and four ranks, failures, resumption, results."""

import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_refine.config import ConfigError
from megatron_refine.files import write_json, write_rows
from megatron_refine.report.metrics import METRICS
from megatron_refine.scaling.results import as_table, collect, write
from megatron_refine.scaling.run import (
    LOG,
    RECORD,
    _begin,
    check_same,
    failure,
    finished,
    record,
    run_here,
    submit_jobs,
)
from megatron_refine.scaling.sweep import points, read_sweep
from megatron_refine.slurm.site import Site
from tests.runs import write_config

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "configs/scaling/ranks.yaml"


def written(tmp_path: Path, **keys: Any) -> Path:
    path = tmp_path / "sweep.yaml"
    base = {"config": [str(ROOT / "configs/quickstart.yaml")], "out": str(tmp_path / "out"),
            "overrides": ["parallel.tp=1", "parallel.sp=false", "train.micro_batch_size=1"]}  # fmt: skip
    path.write_text(yaml.safe_dump(base | keys, sort_keys=False), encoding="utf-8")
    return path


def test_the_points_of_the_shipped_sweep() -> None:
    found, left_out = points(read_sweep(SHIPPED), SHIPPED)
    assert not left_out and {point.ranks for point in found} == {1, 2, 4}
    assert {(p.config.parallel.tp, p.config.parallel.cp, p.config.parallel.pp, p.dp) for p in found} >= {
        (1, 1, 1, 4), (2, 1, 1, 2), (1, 2, 2, 1)
    }  # fmt: skip
    assert len({point.folder for point in found}) == len(found)


def test_weak_scaling_grows_the_batch_with_the_replicas(tmp_path: Path) -> None:
    grid = {"ranks": [1, 2, 4], "parallel.cp": [1, 2]}
    path = written(tmp_path, mode="weak", grid=grid, overrides=["parallel.tp=1", "parallel.sp=false",
                   "train.global_batch_size=2", "train.micro_batch_size=1", "update.mini_batch_size=2"])  # fmt: skip
    found, left_out = points(read_sweep(path), path)
    assert {p.name: (p.config.train.global_batch_size, p.config.mini_batch_size) for p in found} == {
        "ranks1_cp1": (2, 2), "ranks2_cp1": (4, 4), "ranks2_cp2": (2, 2), "ranks4_cp1": (8, 8), "ranks4_cp2": (4, 4)
    }  # fmt: skip
    assert left_out == [
        "ranks1_cp2: world size 1 is no multiple of tp*cp*pp = 1*2*1 = 2: start a multiple of 2 processes or change "
        "parallel.*"
    ]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({}, "names no points"),
        ({"gird": {"ranks": [1]}}, "did you mean grid?"),
        ({"mode": "week", "grid": {"ranks": [1]}}, "'strong' or 'weak'"),
        ({"points": [{"ranks": 0}]}, "ranks=0: must be a whole number"),
        ({"points": [{"ranks": 3, "parallel.tp": 2}]}, "points: ranks3_tp2: world size 3 is no multiple"),
        ({"points": [{"ranks": 2, "parallel.cq": 2}]}, "did you mean parallel.cp?"),
        ({"grid": {"ranks": [1, 1]}}, "the point ranks1 stands twice"),
        ({"grid": {"ranks": [3], "parallel.tp": [2]}}, "no point of the grid is possible"),
    ],
)
def test_what_no_sweep_can_be(tmp_path: Path, keys: dict[str, Any], says: str) -> None:
    path = written(tmp_path, **keys)
    with pytest.raises(ConfigError) as caught:
        points(read_sweep(path), path)
    assert says in str(caught.value) and str(path) in str(caught.value)


def rows(folder: Path, tokens: float, steps: int = 6, **more: float) -> None:
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            row = {"step": step, "train/loss": 1.0, "rollout/reward_mean": 0.5, "perf/tokens_per_sec": tokens + step,
                   "time/step": 2.0, "perf/peak_memory_bytes": 2**30 * step, **more}  # fmt: skip
            file.write(json.dumps(row) + "\n")


def test_efficiency_by_hand(tmp_path: Path) -> None:
    """Medians after the warm-up of 2: of steps 3 to 6, tokens + 4.5."""
    path = written(tmp_path, grid={"ranks": [1, 2, 4]}, overrides=["parallel.tp=1", "parallel.sp=false",
                   "train.micro_batch_size=1", "refine.start_step=0"])  # fmt: skip
    sweep = read_sweep(path)
    found, _ = points(sweep, path)
    for point, tokens in zip(found, (95.5, 145.5, 195.5), strict=True):
        rows(point.folder, tokens, **{"time/score": 0.5, "time/sync": 0.25})
    log = tmp_path / "out/ranks4/logs/attempt_1/train.log"
    log.parent.mkdir(parents=True)
    log.write_text("run x\nNonFiniteError: loss or gradient not finite\n", encoding="utf-8")
    rows_of_4 = (found[2].folder / "metrics.jsonl").read_text(encoding="utf-8")
    (found[2].folder / "metrics.jsonl").write_text("", encoding="utf-8")
    said = collect(sweep, found)[1]
    assert said == [
        "ranks4: no steps after the warm-up yet; its last attempt: NonFiniteError: loss or gradient not finite"
    ]
    (found[2].folder / "metrics.jsonl").write_text(rows_of_4, encoding="utf-8")
    (found[2].folder / RECORD).write_text(json.dumps({"code": 3, "cause": "loss not finite"}), encoding="utf-8")
    results, missing = collect(sweep, found)
    assert [(r.ranks, r.tokens_per_sec, r.efficiency, r.steps) for r in results] == [(1, 100, 1, 4), (2, 150, 0.75, 4)]
    assert (results[0].score, results[0].sync, results[0].peak_gib) == (0.5, 0.25, 6)
    assert missing == ["ranks4: failed with code 3: loss not finite"]
    table = as_table(results, missing)
    assert "| 2 | dp 2 | 1024 | 4 | 150 | 75% |" in table and "- ranks4: failed with code 3" in table
    files = write(tmp_path / "out", sweep, results, missing)
    assert {path.name for path in files} == {"results.csv", "results.md", "throughput.svg", "stages.svg", "memory.svg"}
    table_rows = list(csv.DictReader((tmp_path / "out/results.csv").open(encoding="utf-8")))
    assert [row["efficiency"] for row in table_rows] == ["1", "0.75"]
    assert all(path.read_text(encoding="utf-8").startswith("<svg") for path in files if path.suffix == ".svg")


def test_a_cause_is_the_line_of_the_run_not_of_its_launcher() -> None:
    text = """run x: midtrain step 0/10
data.paths: /nowhere: no such file; name text, jsonl or parquet files
E1127 08:00:00.1 3 torch/distributed/elastic/multiprocessing/api.py:882] failed (exitcode: 2) local_rank: 0
Traceback (most recent call last):
  File "run.py", line 1, in <module>
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
Root Cause (first observed failure):
  exitcode  : 2 (pid: 11)
============================================================"""
    assert failure(text) == (2, "data.paths: /nowhere: no such file; name text, jsonl or parquet files")


def test_slurm_jobs_are_arrays_by_number_of_nodes(tmp_path: Path) -> None:
    path = written(tmp_path, grid={"ranks": [2, 4], "parallel.cp": [1, 2]})
    sweep = read_sweep(path)
    found, _ = points(sweep, path)
    scripts = submit_jobs(sweep, found, Site(gpus_per_node=0, cpu_ranks=2), dry_run=True)
    assert [("--nodes=1" in s, "--nodes=2" in s, "--array=0-1" in s) for s in scripts] == [
        (True, False, True), (False, True, True)
    ]  # fmt: skip
    assert all(str(point.folder) in "".join(scripts) for point in found)
    with pytest.raises(ConfigError, match="ranks2_cp1: 2 ranks are no multiple of a node's 8"):
        submit_jobs(sweep, found, Site(), dry_run=True)


def test_the_paths_of_a_slurm_job_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the sweep's file, of its configuration and of its points."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "configs/quickstart.yaml", "lr=1.yaml")
    keys = {"config": ["lr=1.yaml"], "out": "my sweep", "grid": {"ranks": [1], "data.paths": [["my docs"], ["b"]]}}
    path = written(tmp_path, **keys)
    sweep = read_sweep(path)
    (text,) = submit_jobs(sweep, points(sweep, path)[0], Site(gpus_per_node=0, cpu_ranks=1), dry_run=True)
    assert f"--config {tmp_path}/lr=1.yaml)" in text and "#SBATCH --array=0-1\n" in text
    assert f"run_dir='{tmp_path}/my sweep/nodes1'" in text
    for name, docs in (("ranks1_paths['my docs']", "my docs"), ("ranks1_paths['b']", "b")):
        for words in (f"run.dir={tmp_path}/my sweep/{name}", f"data.paths=[{tmp_path}/{docs}]",
                      f"data.cache_dir={tmp_path}/.cache/data"):  # fmt: skip
            assert shlex.quote(words) in text, words


def scaling(*arguments: str) -> tuple[int, str, str]:
    line = [sys.executable, str(ROOT / "tools/scaling.py"), *arguments]
    done = subprocess.run(
        line, capture_output=True, encoding="utf-8", check=False, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_the_shipped_sweep_runs_names_what_failed_and_goes_on(tmp_path: Path) -> None:
    """Scaled down, without points of four ranks, and with one whose data is missing; then the same command again."""
    tree = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    config = write_config(tmp_path, tmp_path / "cache", eval={"sequences": 0})
    tree |= {"config": [str(config)], "out": str(tmp_path / "out"), "warm_up": 1}
    tree["overrides"] += ["train.steps=3"]
    tree["grid"]["ranks"] = [1]  # every rank imports Megatron anew
    tree["points"] = [tree["points"][0], {"ranks": 1, "data.paths": "[/nowhere]"}]
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    code, out, err = scaling(str(path))
    assert code == 1, out + err
    assert "ranks1_paths[-nowhere]: failed with code 2: " in out and "/nowhere: no such file or folder" in out
    sweep = read_sweep(path)
    found, _ = points(sweep, path)
    results, missing = collect(sweep, found)
    assert [r.ranks for r in results] == [1, 2] and len(missing) == 1
    assert all(r.steps == 2 and r.tokens_per_sec > 0 and r.update > 0 and r.peak_gib > 0 for r in results)
    entry = json.loads((found[0].folder / RECORD).read_text(encoding="utf-8"))
    assert entry["code"] == 0 and finished(found[0])
    assert not finished(replace(found[0], overrides=[*found[0].overrides, "train.steps=9"]))
    assert not finished(replace(found[0], config=found[1].config))
    logs = {point.name: (point.folder / LOG).stat().st_mtime_ns for point in found}
    code, out, _ = scaling(str(path))
    assert code == 1 and out.count("finished before") == 2  # the failed one was tried again
    again = {point.name: (point.folder / LOG).stat().st_mtime_ns for point in found}
    assert [name for name in logs if logs[name] != again[name]] == ["ranks1_paths[-nowhere]"]


def test_the_command_line(tmp_path: Path) -> None:
    code, out, _ = scaling(str(SHIPPED), "--dry-run")
    assert code == 0 and out.count("torch.distributed.run") == 7
    code, out, err = scaling("--predict", "configs/midtrain_delta_net_7b.yaml", "--gpus", "8,1024")
    assert code == 0 and out.count("\n") == 4 and "| 1024 | 16384 |" in out, err
    code, out, err = scaling(str(tmp_path / "none.yaml"))
    assert code == 2 and "none.yaml: cannot be read" in err and not out


def test_steps_of_another_configuration_are_neither_gone_on_from_nor_collected(tmp_path: Path) -> None:
    path = written(tmp_path, grid={"ranks": [1]})
    (point,), _ = points(read_sweep(path), path)
    _begin(point)
    row = {"train/loss": 1.0, "perf/tokens_per_sec": 5.0, "time/update": 1.0}
    write_rows(point.folder / METRICS, [row | {"step": step} for step in range(1, 9)])
    path = written(tmp_path, grid={"ranks": [1]}, overrides=[*read_sweep(path).overrides, "refine.enabled=false"])
    sweep = read_sweep(path)
    (changed,), _ = points(sweep, path)
    assert changed.folder == point.folder
    with pytest.raises(ConfigError, match=f"{point.folder}: has steps of another configuration of this point; choose"):
        run_here(sweep, [changed], print)
    assert collect(sweep, [changed]) == ([], [f"{point.name}: its folder has steps of another configuration"])
    shutil.rmtree(point.folder)
    check_same([changed])


def test_a_job_that_was_submitted_stands_for_the_failure_before_it(tmp_path: Path) -> None:
    overrides = [*read_sweep(written(tmp_path, grid={"ranks": [1]})).overrides, "refine.enabled=false"]
    path = written(tmp_path, grid={"ranks": [1]}, overrides=overrides, warm_up=1)
    sweep = read_sweep(path)
    (point,), _ = points(sweep, path)
    _begin(point)
    write_json(point.folder / RECORD, record(point) | {"code": 2, "cause": "no data"})
    assert collect(sweep, [point])[1] == [f"{point.name}: failed with code 2: no data"]
    _begin(point)
    write_rows(point.folder / METRICS, [{"train/loss": 1.0, "perf/tokens_per_sec": 5.0, "step": n} for n in (1, 2, 3)])
    assert [result.steps for result in collect(sweep, [point])[0]] == [2] and not finished(point)
