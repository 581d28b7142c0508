"""The checks of a commit and of a hosted runner: they name what exists, and all files pass them."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOW = ROOT / ".github/workflows/ci.yml"
ACTION = ROOT / ".github/actions/environment/action.yml"


def read(path: Path | str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def hooks() -> dict[str, dict[str, Any]]:
    (local,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert local["repo"] == "local", "hooks from elsewhere are fetched"
    return {hook["id"]: hook for hook in local["hooks"]}


def files(hook: dict[str, Any]) -> list[str]:
    """The tracked files that a hook sees. A text file is one without zero bytes."""
    whole = yaml.safe_load(read(".pre-commit-config.yaml"))["exclude"]
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    found = [path for path in listed.split("\0") if path and (ROOT / path).is_file() and not (ROOT / path).is_symlink()]
    found = [path for path in found if re.search(hook.get("files", ""), path) and not re.search(whole, path)]
    found = [path for path in found if not re.search(hook.get("exclude", "^$"), path)]
    return [path for path in found if hook.get("types") != ["text"] or b"\0" not in (ROOT / path).read_bytes()]


def hits(hook: dict[str, Any], content: bytes) -> bool:
    """Search as pre-commit's pygrep does: line by line, or all at once."""
    pattern = hook["entry"].encode()
    if "--multiline" in hook.get("args", []):
        return re.search(pattern, content, re.MULTILINE | re.DOTALL) is not None
    return any(re.search(pattern, line) for line in content.splitlines(keepends=True))


def greps() -> list[str]:
    return [name for name, hook in hooks().items() if hook["language"] == "pygrep"]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git checkout")
@pytest.mark.parametrize("name", greps())
def test_all_files_pass_what_is_searched_for(name: str) -> None:
    hook = hooks()[name]
    assert [path for path in files(hook) if hits(hook, (ROOT / path).read_bytes())] == []


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("blanks", "a \nb\n", " a\n\n"), ("blanks", "a\r\n", "a\n"), ("last-line", "a", "a\n"),
        ("last-line", "a\n\n", "a\n\nb\n"), ("conflicts", "<<<<<<< HEAD\n", "a <<<<<<<\n"),
        ("keys", "-----BEGIN RSA PRIVATE" " KEY-----\n", "a private key\n"),
    ],
)  # fmt: skip
def test_what_is_searched_for_is_found(name: str, bad: str, good: str) -> None:
    assert hits(hooks()[name], bad.encode()) and not hits(hooks()[name], good.encode())


def ran(name: str, paths: list[str]) -> subprocess.CompletedProcess[str]:
    line = [word.replace(".venv/bin/python", sys.executable) for word in shlex.split(hooks()[name]["entry"])]
    return subprocess.run([*line, *paths], cwd=ROOT, capture_output=True, encoding="utf-8")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git checkout")
@pytest.mark.parametrize("name", ["large", "yaml", "shell"])
def test_all_files_pass_what_is_run(name: str) -> None:
    found = files(hooks()[name])
    assert found and ran(name, found).returncode == 0


@pytest.mark.parametrize(("name", "bad"), [("large", "x" * 500_001), ("yaml", "a: ]"), ("shell", "if true; then")])
def test_what_is_run_refuses(name: str, bad: str, tmp_path: Path) -> None:
    (tmp_path / "bad").write_text(bad, encoding="utf-8")
    (tmp_path / "good").write_text("a: 1\n" if name == "yaml" else "true\n", encoding="utf-8")
    done = ran(name, [str(tmp_path / "bad"), str(tmp_path / "good")])
    assert done.returncode == 1 and str(tmp_path / "bad") in done.stdout + done.stderr


def test_pre_commit_takes_the_configuration() -> None:
    program = shutil.which("pre-commit")
    if not program:
        pytest.skip("pre-commit is not installed: pip install pre-commit")
    subprocess.run([program, "validate-config", str(ROOT / ".pre-commit-config.yaml")], check=True)


def steps() -> list[dict[str, Any]]:
    jobs = yaml.safe_load(read(WORKFLOW))["jobs"].values()
    return [step for job in jobs for step in job["steps"]] + yaml.safe_load(read(ACTION))["runs"]["steps"]


def commands() -> str:
    lines = [step["run"] for step in steps() if "run" in step] + [read(".ci/run"), read("RELEASING.md")]
    return "\n".join([*lines, *(hook["entry"] for hook in hooks().values())])


def test_every_target_of_make_that_is_called_exists() -> None:
    text = read("Makefile") + read("tools/environments.mk")
    targets = set(re.findall(r"^([a-z./-]+):", text, re.MULTILINE))
    called = set(re.findall(r"\bmake ([a-z./-]+)", commands()))
    assert {"lint", "test", "test-all", ".venv/ready"} <= called <= targets, called - targets


def test_every_file_of_ours_that_is_called_exists() -> None:
    named = set(re.findall(r"\b((?:tests|tools|configs|docs|launch)/[\w./-]+\w)", commands()))
    assert named and all((ROOT / path).exists() for path in named), named


def test_the_runner_may_only_read() -> None:
    workflow = yaml.safe_load(read(WORKFLOW))
    assert workflow["permissions"] == {"contents": "read"} and workflow["concurrency"]["cancel-in-progress"] is True
    assert not any("permissions" in job for job in workflow["jobs"].values())
    assert all(job["timeout-minutes"] <= 90 for job in workflow["jobs"].values())
    used = [step["uses"] for step in steps() if "uses" in step]
    assert all(re.fullmatch(r"actions/[a-z-]+@v\d+|\./\.github/actions/environment", name) for name in used), used
    outs = [step for step in steps() if step.get("uses", "").startswith("actions/checkout")]
    assert outs and all(step["with"]["persist-credentials"] is False for step in outs)


def test_environments_are_cached_by_what_make_makes_them_from() -> None:
    """The key is the name that tools/environment.sh gives the environment, of the same files."""
    made_from = re.findall(r"^MADE_FROM := (.+)$", read("tools/environments.mk"), re.MULTILINE)[0]
    line = next(step["run"] for step in steps() if step.get("id") == "kept")
    assert f"tools/environment.sh name .venv - python {made_from})" in line
    name = subprocess.run(["tools/environment.sh", "name", ".venv", "-", sys.executable, *made_from.split()], cwd=ROOT,
                          capture_output=True, encoding="utf-8", check=True).stdout  # fmt: skip
    assert re.fullmatch(r"venv-[0-9a-f]{40}\n", name)


def test_the_quickstarts_baseline_is_ntp_to_the_end() -> None:
    steps = yaml.safe_load(read("configs/quickstart.yaml"))["train"]["steps"]
    assert f"refine.start_step={steps};" in read("Makefile")


def test_each_version_of_python_is_one_that_setup_py_allows() -> None:
    versions = yaml.safe_load(read(WORKFLOW))["jobs"]["test"]["strategy"]["matrix"]["python"]
    lowest = re.findall(r'python_requires=">=(3\.\d+)"', read("setup.py"))[0]
    mypy = re.findall(r'^python_version = "(.+)"', read("pyproject.toml"), re.MULTILINE)[0]
    assert versions[0] == lowest == mypy
    classified = re.findall(r"\bPython :: .*in \((.+)\)\]", read("setup.py"))[0]
    assert re.findall(r"3\.\d+", classified) == versions


def test_an_environment_is_linked_whole_or_not_at_all(tmp_path: Path) -> None:
    """A copy that fails half way leaves nothing that the next `make` would take for an environment."""
    (tmp_path / "key").write_text("made from", encoding="utf-8")
    own, cp = tmp_path / ".venv", tmp_path / "path/cp"
    (own / "bin").mkdir(parents=True)
    (own / "bin/tool").write_text(f"#!{own}/bin/python", encoding="utf-8")
    (own / "sglang_cpu_stubs.py").write_text("stubs", encoding="utf-8")
    cp.parent.mkdir()
    cp.write_text('#!/bin/sh\nmkdir -p "$3/bin"\nexit 1\n', encoding="utf-8")
    cp.chmod(0o755)

    def call(action: str, folder: Path, path: str = "") -> int:
        folder.mkdir(exist_ok=True)
        line = [str(ROOT / "tools/environment.sh"), action, ".venv", str(tmp_path / "cache"), sys.executable]
        environment = os.environ | {"PATH": path + os.environ["PATH"]}
        return subprocess.run([*line, str(tmp_path / "key")], cwd=folder, env=environment).returncode

    clone = tmp_path / "clone"
    assert call("keep", tmp_path) == 0
    assert call("restore", clone, f"{cp.parent}:") != 0 and not list(clone.iterdir())
    assert call("restore", clone) == 0 and [path.name for path in clone.iterdir()] == [".venv"]
    assert (clone / ".venv/bin/tool").read_text(encoding="utf-8") == f"#!{clone}/.venv/bin/python"
    assert (own / "bin/tool").read_text(encoding="utf-8") == f"#!{own}/bin/python"
    (clone / ".venv/sglang_cpu_stubs.py").write_text("newer ones", encoding="utf-8")  # as make writes them
    assert next((tmp_path / "cache").glob("*/sglang_cpu_stubs.py")).read_text(encoding="utf-8") == "stubs"
