"""The command that submits: the script that it writes, and what it refuses before anything is submitted."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_refine.cli import submit
from megatron_refine.config import ConfigError, load
from megatron_refine.config.load import read_as
from megatron_refine.config.paths import resolved
from megatron_refine.models.family import FAMILIES
from megatron_refine.slurm.site import Site
from megatron_refine.slurm.sweep import points

ROOT = Path(__file__).parents[1]
QUICKSTART = "configs/quickstart.yaml"
QUICKSTART_FILE = ROOT / QUICKSTART


def script(
    tmp_path: Path, *arguments: str, site: dict[str, Any] | None = None, config: str = QUICKSTART, run_dir: bool = True
) -> str:
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({"gpus_per_node": 2} | (site or {})), encoding="utf-8")
    folder = [f"run.dir={tmp_path}/run"] if run_dir else []
    line = [config, "--site", str(tmp_path / "site.yaml"), *folder, *arguments]
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
    command = f"-m megatron_refine train --config {ROOT / QUICKSTART} run.dir={tmp_path}/run data.cache_dir="
    assert f"train=(/opt/python {command}{os.getcwd()}/.cache/data)" in text


def test_words_go_before_the_interpreter_of_every_rank(tmp_path: Path) -> None:
    engine = ["--engine-nodes", "1", "engine.kind=sglang", f"engine.python={sys.executable}"]
    site = {"prefix": ["apptainer", "exec", "--nv", "an image.sif"], "python": "/opt/python"}
    text = script(tmp_path, "--nodes", "1", *engine, site=site)
    assert "\ntrain=(apptainer exec --nv 'an image.sif' /opt/python -m megatron_refine" in text
    assert "\nserve=(apptainer exec --nv 'an image.sif' /opt/python " in text


HOSTILE = "a b%j#c $(id) it's=1"  # of a folder: blank, %, #, quotes, what bash would run
STUBS = {
    "srun": '{ echo "$PWD"; printf "%s\\0" "$@"; } >"$OUT/.$$"; mv "$OUT/.$$" "$OUT/$$"\n'
    'until [ "$(ls "$OUT" | wc -l)" -ge "${STEPS:-1}" ]; do sleep 0.05; done',
    "scontrol": 'case "$*" in "show hostnames"*) echo n1; echo n2;; *node*) echo "NodeAddr=10.0.0.${@: -1}";; esac',
    "scancel": "exit 0",
}


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a job's script starts, by bash: (folder, arguments) of each srun; the programs of SLURM are stubs."""
    programs, out = tmp_path / "bin", tmp_path / "out"
    programs.mkdir()
    for name, body in STUBS.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        (programs / name).chmod(0o755)

    def run(text: str, **variables: str) -> list[tuple[str, list[str]]]:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        environment = os.environ | {"OUT": str(out), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]",
                                    "SLURM_JOB_END_TIME": "1", **variables}  # fmt: skip
        line = ["timeout", "600", "bash", "-c", text]
        done = subprocess.run(line, cwd="/", env=environment, capture_output=True, encoding="utf-8")
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert "job 7, restart 0: done" in done.stdout
        found = [path.read_text(encoding="utf-8").split("\n", 1) for path in sorted(out.iterdir())]
        return sorted((folder, arguments.split("\0")[:-1]) for folder, arguments in found)

    return run


def option(arguments: list[str], name: str) -> str:
    return next(text for text in arguments if text.startswith(f"{name}=")).removeprefix(f"{name}=")


def test_bash_runs_what_was_asked_for(tmp_path: Path, ran: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every word arrives as it was written, and the run, its logs and its watcher share one folder."""
    folder = tmp_path / HOSTILE
    folder.mkdir()
    monkeypatch.chdir(folder)
    words = ["run.dir=r u n", "run.seed=7", "data.text_column=a #2", "data.paths=[my docs, it's]"]
    text = script(tmp_path, *words, config=str(ROOT / QUICKSTART), run_dir=False)
    (place, arguments), run = ran(text)[0], folder / "r u n"
    assert place == str(folder)
    start = arguments.index(sys.executable)
    assert arguments[start : start + 6] == [
        sys.executable, "-m", "megatron_refine", "train", "--config", str(ROOT / QUICKSTART)
    ]  # fmt: skip
    monkeypatch.chdir("/")
    config = load(QUICKSTART_FILE, arguments[start + 6 :], FAMILIES)
    assert config.run.dir == str(run) and config.run.seed == 7 and config.data.text_column == "a #2"
    assert config.data.paths == [f"{folder}/my docs", f"{folder}/it's"]
    assert config.data.cache_dir == f"{folder}/.cache/data"
    assert option(arguments, "--output").replace("%%", "%") == f"{run}/logs/slurm-7-0/ranks.log"
    assert (run / "logs/slurm-7-0").is_dir()


def test_bash_runs_the_point_of_its_task(tmp_path: Path, ran: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / HOSTILE
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "sweep.yaml").write_text("data.paths: [[my docs], [b]]\n", encoding="utf-8")
    words = ["--array", "sweep.yaml", "--at-once", "1", "run.dir=s w"]
    text = script(tmp_path, *words, config=str(ROOT / QUICKSTART), run_dir=False)
    assert "--array=0-1%1" in options_of(text)
    monkeypatch.chdir("/")
    for task, docs in (("0", "my docs"), ("1", "b")):
        arguments = ran(text, SLURM_ARRAY_TASK_ID=task)[0][1]
        overrides = arguments[arguments.index(str(ROOT / QUICKSTART)) + 1 :]
        config = load(QUICKSTART_FILE, overrides, FAMILIES)
        assert config.data.paths == [f"{folder}/{docs}"] and config.run.dir == f"{folder}/s w/paths=[{docs}]"
        assert option(arguments, "--output").replace("%%", "%") == f"{config.run.dir}/logs/slurm-7-0/ranks.log"


def test_bash_starts_servers_beside_the_trainer(tmp_path: Path, ran: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / HOSTILE
    folder.mkdir()
    monkeypatch.chdir(folder)
    words = ["--engine-nodes", "1", "engine.kind=sglang", f"engine.python={sys.executable}", "run.dir=r"]
    text = script(tmp_path, *words, config=str(ROOT / QUICKSTART), run_dir=False)
    (_, first), (_, second) = ran(text, STEPS="2")
    trainer, server = (first, second) if "train" in first else (second, first)
    start = server.index("-m")
    assert server[start : start + 3] == ["-m", "megatron_refine", "serve"] and server[-2:] == ["--hosts", "10.0.0.n2"]
    assert f"run.dir={folder}/r" in server and option(server, "--output").endswith("/r/logs/slurm-7-0/engine-%n.log")
    config = load(QUICKSTART_FILE, trainer[trainer.index(str(ROOT / QUICKSTART)) + 1 :], FAMILIES)
    assert config.engine.urls == ["http://10.0.0.n2:30000"] and config.engine.master_address == "10.0.0.n1"
    assert config.engine.python == "" and config.run.dir == f"{folder}/r"


def test_files_that_only_the_nodes_see(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A login node may not see them: without the preflight the job is written; the configuration is checked still."""
    words = [QUICKSTART, "--dry-run", f"run.dir={tmp_path}/run", "data.paths=[/scratch/only/there]"]
    words += ["--gpus-per-node", "2"]
    assert submit.main(words) == 2 and "/scratch/only/there" in capsys.readouterr().err
    assert submit.main([*words, "--no-preflight"]) == 0 and "#SBATCH" in capsys.readouterr().out
    assert submit.main([*words, "--no-preflight", "train.stps=3"]) == 2


def test_no_path_of_a_job_is_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From files, overrides and defaults: the folder that one submits from is meant."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("WORK", "/w")
    model = load(ROOT / QUICKSTART, [], FAMILIES).model.model_dump()
    (tmp_path / "lr=1").mkdir()
    (tmp_path / "lr=1/m.yaml").write_text(yaml.safe_dump({"model": model}), encoding="utf-8")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({
        "data": {"paths": ["docs", "/d", "~/d"], "valid_paths": ["v"], "tokenizer": "t"}, "engine": {"sync_dir": "~/s"},
        "task": {"valid_paths": ["$WORK/a, b"]},
        "checkpoint": {"load": "../l"}, "eval": {"data": "./e", "essays": "f"},
    }), encoding="utf-8")  # fmt: skip
    words = ["c.yaml", "model=lr=1/m.yaml", "eval.essays=g", "run.dir=mine", "--gpus-per-node", "1"]
    job = submit.build(submit.parse(words))
    assert str(job.run_dir) == f"{tmp_path}/mine" and job.name == "mine"
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", "/home/node")  # what the job meets is another environment
    monkeypatch.delenv("WORK")
    assert job.arguments[:2] == ["--config", f"{tmp_path}/c.yaml"]
    config = load(job.arguments[1], job.arguments[2:], FAMILIES)
    assert config == job.config and dict(resolved(config, {})) == {}
    assert config.data.paths == [f"{tmp_path}/docs", "/d", "/home/me/d"] and config.data.tokenizer == f"{tmp_path}/t"
    assert (config.data.valid_paths, config.data.cache_dir) == ([f"{tmp_path}/v"], f"{tmp_path}/.cache/data")
    assert config.task.valid_paths == ["/w/a, b"]
    assert (config.eval.data, config.eval.essays) == (f"{tmp_path}/e", f"{tmp_path}/g")
    assert (config.checkpoint.load, config.engine.sync_dir) == (f"{tmp_path}/../l", "/home/me/s")


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("plain-1.5", "--job-name=plain-1.5"), ("my run", '"--job-name=my run"'), ("a#1", '"--job-name=a#1"'),
        ('say "x"', '"--job-name=say \\"x\\""'), ("it's", "\"--job-name=it's\""), ("", "--job-name=run"),
    ],
)  # fmt: skip
def test_what_sbatch_reads_is_quoted(tmp_path: Path, name: str, written: str) -> None:
    assert options_of(script(tmp_path, "--name", name))[0] == written


def test_the_log_of_a_folder_with_a_percent_sign(tmp_path: Path) -> None:
    """%j is the job's id to sbatch, %% a percent sign."""
    text = script(tmp_path, f"run.dir={tmp_path}/50%j x")
    assert f'"--output={tmp_path}/50%%j x/logs/slurm-%j.out"' in options_of(text)


@pytest.mark.parametrize("words", [["run.dir=a\\b"], ["run.dir=a\nb"], ["--name", "a\nb"]])
def test_what_sbatch_cannot_be_told_is_refused(tmp_path: Path, words: list[str]) -> None:
    with pytest.raises(ConfigError, match="a job cannot have a backslash or a new line in it"):
        script(tmp_path, *words)


def test_nodes_without_gpus_ask_for_none(tmp_path: Path) -> None:
    options = options_of(script(tmp_path, site={"gpus_per_node": 0, "cpu_ranks": 2}))
    assert "--ntasks-per-node=2" in options and not any(option.startswith("--gpus") for option in options)


def test_engine_nodes_follow_those_that_train(tmp_path: Path) -> None:
    engine = ["engine.kind=sglang", f"engine.python={sys.executable}"]
    text = script(tmp_path, "--nodes", "1", "--engine-nodes", "2", *engine)
    assert "--nodes=3" in options_of(text) and "train_nodes=1 ranks_per_node=2\nengine_nodes=2" in text
    assert f"-m megatron_refine serve --port 30000 --config {ROOT / QUICKSTART}" in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--nodes", "0"], "--nodes=0: must be 1 or more"),
        (["--nodes", "3"], r"train\.global_batch_size=4 is no multiple of"),
        (["--engine-nodes", "1"], r"--engine-nodes=1: engine\.kind is native; set it to sglang"),
        (["--engine-nodes", "1", "engine.kind=sglang", "engine.urls=[http://a:1]"], "engine.urls names servers that"),
        (
            ["--engine-nodes", "1", "engine.kind=sglang", "engine.python=python3", "engine.offload=true"],
            r"--engine-nodes: the servers have GPUs of their own; leave out engine\.offload",
        ),
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
        (f"data.text_column: [a, {'b' * 250}]", "text_column=b+.{3}: its folder would have a name of 262 bytes"),
    ):  # fmt: skip
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=message):
            points(file, config)


def test_every_point_of_a_sweep_is_checked_first(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("optimizer.lr: [1e-3, -1]\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"optimizer\.lr=-1"):
        script(tmp_path, "--array", str(tmp_path / "sweep.yaml"))
    (tmp_path / "text").write_text("a text", encoding="utf-8")
    (tmp_path / "sweep.yaml").write_text(f"data.paths: [['{tmp_path}/text'], [/nowhere]]\n", encoding="utf-8")
    job = submit.build(submit.parse([QUICKSTART, "--gpus-per-node", "2", "--array", str(tmp_path / "sweep.yaml")]))
    with pytest.raises(ConfigError, match="/nowhere: no such file or folder"):
        submit.check(job)


def command(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | ({"PATH": path} if path else {})
    return subprocess.run([sys.executable, "launch/submit.py", *arguments], cwd=ROOT, env=environment,
                          capture_output=True, encoding="utf-8")  # fmt: skip


def test_a_dry_run_prints_script_and_estimate(tmp_path: Path) -> None:
    done = command(QUICKSTART, "--gpus-per-node", "2", "--dry-run", f"run.dir={tmp_path}/run")
    assert done.returncode == 0 and done.stdout.startswith("#!/bin/bash\n#SBATCH --job-name=run\n")
    assert "memory of a rank" in done.stdout and not (tmp_path / "run").exists()


@pytest.mark.parametrize("site", [{"prefix": ["apptainer", "exec", "image.sif"]}, {"container": "image.sqsh"}, {}])
def test_the_interpreters_of_an_image_are_not_looked_for_here(tmp_path: Path, site: dict[str, Any]) -> None:
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(site | {"gpus_per_node": 2}), encoding="utf-8")
    words = ["engine.kind=sglang", "engine.python=/opt/sglang/bin/python", f"run.dir={tmp_path}/run"]
    done = command(QUICKSTART, "--site", str(tmp_path / "site.yaml"), "--dry-run", *words)
    expected = "" if site else "engine.python=/opt/sglang/bin/python: no such interpreter"
    assert done.returncode == (0 if site else 2) and done.stderr.startswith(expected), done.stderr
    assert not site or "engine.python=/opt/sglang/bin/python" in done.stdout


def test_each_link_of_a_chain_waits_for_the_end_of_the_one_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However that one ended: the next goes on from there. So only the last is requeued."""
    said, sbatch = tmp_path / "said", tmp_path / "bin/sbatch"
    sbatch.parent.mkdir()
    answer = f'#!/bin/bash\necho "$@" >>"{said}"\necho "$((40 + $(wc -l <"{said}")));cluster"\n'
    sbatch.write_text(answer, encoding="utf-8")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    job = submit.build(submit.parse([QUICKSTART, "--gpus-per-node", "2", f"run.dir={tmp_path}/run"]))
    assert submit.submit(job, 3) == ["41", "42", "43"]
    lines = [line.split() for line in said.read_text(encoding="utf-8").splitlines()]
    assert [line[:-1] for line in lines] == [
        ["--parsable"], ["--parsable", "--dependency=afterany:41"], ["--parsable", "--dependency=afterany:42"]
    ]  # fmt: skip
    scripts = [Path(line[-1]).read_text(encoding="utf-8") for line in lines]
    assert ["requeues=yes" in text for text in scripts] == [False, False, True]
    assert submit.submit(job) == ["44"] and "requeues=yes" in job.script()


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


def test_the_example_of_a_site_has_every_key() -> None:
    assert yaml.safe_load((ROOT / "launch/site.yaml").read_text(encoding="utf-8")).keys() == Site.model_fields.keys()
