"""The command that submits: the script that it writes, and what it refuses before anything is submitted."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import submit
from megatron_refine.config import ConfigError, load
from megatron_refine.config.load import read_as
from megatron_refine.models.family import FAMILIES
from megatron_refine.slurm.site import Site
from megatron_refine.slurm.sweep import points

ROOT = Path(__file__).parents[1]
QUICKSTART = "configs/quickstart.yaml"


def script(tmp_path: Path, *arguments: str, site: dict[str, Any] | None = None, config: str = QUICKSTART) -> str:
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({"gpus_per_node": 2} | (site or {})), encoding="utf-8")
    line = [config, "--site", str(tmp_path / "site.yaml"), f"run.dir={tmp_path}/run", *arguments]
    return submit.build(submit.parse(line)).script()


def options_of(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


def test_what_the_site_says_is_what_sbatch_reads(tmp_path: Path) -> None:
    site = {
        "account": "lab", "partition": "gpu", "qos": "high", "time": "12:00:00", "cpus_per_rank": 8,
        "signal_seconds": 600, "sbatch": ["--exclusive"], "modules": ["cuda/12.4"], "container": "image.sqsh",
        "mounts": ["/data:/data"], "environment": {"NCCL_DEBUG": "WARN", "WORDS": "two words"},
        "prologue": "source env.sh\necho ready", "python": "/opt/python", "srun": ["--cpu-bind=none"],
    }  # fmt: skip
    text = script(tmp_path, "--nodes", "1", site=site)
    assert {
        "--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=8", "--account=lab",
        "--partition=gpu",
        "--qos=high", "--time=12:00:00", "--signal=B:USR1@600", "--requeue", "--open-mode=append", "--exclusive",
        f"--output={tmp_path}/run/logs/slurm-%j.out",
    } <= set(options_of(text))  # fmt: skip
    for line in (
        "module load cuda/12.4", "export NCCL_DEBUG=WARN", "export WORDS='two words'", "source env.sh\necho ready",
        "srun_options=(--cpu-bind=none --container-image=image.sqsh --container-mounts=/data:/data)",
    ):  # fmt: skip
        assert line in text
    assert f"train=(/opt/python -m megatron_refine.train --config {ROOT / QUICKSTART} run.dir={tmp_path}/run)" in text


def test_the_script_is_valid_bash(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("optimizer.lr: [1e-3, 2e-3]\n", encoding="utf-8")
    for arguments in (["--nodes", "1"], ["--array", str(tmp_path / "sweep.yaml"), "--at-once", "1"]):
        done = subprocess.run(["bash", "-n"], input=script(tmp_path, *arguments), encoding="utf-8", capture_output=True)
        assert not done.stderr and done.returncode == 0


def test_nodes_without_gpus_ask_for_none(tmp_path: Path) -> None:
    options = options_of(script(tmp_path, site={"gpus_per_node": 0, "cpu_ranks": 2}))
    assert "--ntasks-per-node=2" in options and not any(option.startswith("--gpus") for option in options)


def test_engine_nodes_follow_those_that_train(tmp_path: Path) -> None:
    engine = ["engine.kind=sglang", f"engine.python={sys.executable}"]
    text = script(tmp_path, "--nodes", "1", "--engine-nodes", "2", *engine)
    assert "--nodes=3" in options_of(text) and "train_nodes=1 ranks_per_node=2\nengine_nodes=2" in text
    assert f"tools/serve.py --port 30000 --config {ROOT / QUICKSTART}" in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--nodes", "0"], "--nodes=0: must be 1 or more"),
        (["--nodes", "3"], r"train\.global_batch_size=4 is no multiple of"),
        (["--engine-nodes", "1"], r"--engine-nodes=1: engine\.kind is native; set it to sglang"),
        (["--engine-nodes", "1", "engine.kind=sglang", "engine.urls=[http://a:1]"], "engine.python is missing"),
        (["optimizer.lrr=1"], r"optimizer\.lrr: unknown key; did you mean optimizer\.lr\?"),
    ],
)
def test_what_cannot_run_is_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        script(tmp_path, *arguments)


@pytest.mark.parametrize(
    "text, message",
    [
        ("acount: lab", r"site\.yaml: acount: unknown key; did you mean account\?"),
        ("time: an hour", r"site\.yaml: time='an hour'"),
        ("retries: -1", r"site\.yaml: retries=-1"),
        ("- a", "must hold sections"),
    ],
)
def test_a_wrong_site_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "site.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_as(tmp_path / "site.yaml", Site)


def test_the_points_of_a_sweep(tmp_path: Path) -> None:
    config, file = load(QUICKSTART, ["run.dir=runs/x"], FAMILIES), tmp_path / "sweep.yaml"
    file.write_text("optimizer.lr: [1e-3, 2e-3]\nrefine.enabled: [true, false]\n", encoding="utf-8")
    found = points(file, config)
    assert found[1] == ["optimizer.lr=0.001", "refine.enabled=false", "run.dir=runs/x/lr=0.001,enabled=false"]
    assert len(found) == 4 and len({point[-1] for point in found}) == 4
    file.write_text("- {model: lact_tiny}\n- {run.seed: 2, optimizer.lr: 1e-4}\n", encoding="utf-8")
    assert points(file, config)[0] == ["model=lact_tiny", "run.dir=runs/x/model=lact_tiny"]
    for text, message in (
        ("optimizer.lr: 1e-3", "a sweep is"), ("[]", "a sweep is"), ("run.dir: [a, b]", "a folder of its own"),
        ("run.seed: [1, 1]", "seed=1 stands twice"), ("{", "not valid YAML"),
    ):  # fmt: skip
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=message):
            points(file, config)


def test_every_point_of_a_sweep_is_checked_first(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("optimizer.lr: [1e-3, -1]\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"optimizer\.lr=-1"):
        script(tmp_path, "--array", str(tmp_path / "sweep.yaml"))


def command(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | ({"PATH": path} if path else {})
    return subprocess.run([sys.executable, "launch/submit.py", *arguments], cwd=ROOT, env=environment,
                          capture_output=True, encoding="utf-8")  # fmt: skip


def test_a_dry_run_prints_script_and_estimate(tmp_path: Path) -> None:
    done = command(QUICKSTART, "--gpus-per-node", "2", "--dry-run", f"run.dir={tmp_path}/run")
    assert done.returncode == 0 and done.stdout.startswith("#!/bin/bash\n#SBATCH --job-name=run\n")
    assert "memory of a rank" in done.stdout and not (tmp_path / "run").exists()


def test_without_slurm_the_line_says_so(tmp_path: Path) -> None:
    done = command(QUICKSTART, "--gpus-per-node", "2", f"run.dir={tmp_path}/run", path=str(tmp_path))
    assert done.returncode == 2 and done.stderr == (
        "sbatch: not found; submit from a login node, or look at it with --dry-run\n"
    )


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("one_node", ["configs/midtrain_delta_net_1.3b.yaml"]),
        ("many_nodes", ["configs/midtrain_delta_net_1.3b.yaml", "--nodes", "4", "parallel.tp=2", "parallel.sp=true"]),
    ],
)
def test_the_examples_are_what_the_command_writes(name: str, arguments: list[str], monkeypatch: Any) -> None:
    """launch/*.sbatch, to be edited by hand. Where it differs:
    python launch/submit.py ... --site launch/site.yaml --dry-run"""
    monkeypatch.chdir(ROOT)
    job = submit.build(submit.parse([*arguments, "--site", "launch/site.yaml", "--name", name]))
    expected = job.script().replace(f"{ROOT}/", "").replace(str(ROOT), "/path/to/megatron_refine")
    assert (ROOT / f"launch/{name}.sbatch").read_text(encoding="utf-8") == expected
