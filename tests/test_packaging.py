"""What pip gets: sdist and wheel, from every form in which the project is passed on."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from megatron_refine import __version__
from tests import runs

ROOT = Path(__file__).parents[1]
LINKS = ("models", "kernels", "configs")
pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="builds what git tracks; this is no checkout")


def git(*arguments: str, folder: Path = ROOT) -> bytes:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, check=True).stdout


def tracked() -> set[str]:
    return {path for path in git("ls-tree", "-r", "-z", "--name-only", "HEAD").decode().split("\0") if path}


def build(kind: str, source: Path, out: Path) -> Path:
    """A wheel or an sdist of a folder, by the hook that pip calls."""
    out.mkdir()
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    (found,) = out.iterdir()
    return found


def archive(folder: Path) -> Path:
    """The last commit as `git archive` gives it."""
    with tarfile.open(fileobj=io.BytesIO(git("archive", "HEAD"))) as tar:
        tar.extractall(folder, filter="data")
    return folder


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


def test_a_wheel_holds_all_that_a_run_reads(tmp_path: Path) -> None:
    found = contents(build("wheel", archive(tmp_path / "source"), tmp_path / "out"))
    links = {f"megatron_refine/{name}" for name in LINKS}
    wanted = {path for path in tracked() if path.startswith("megatron_refine/")} - links
    wanted |= {f"megatron_refine/{path}" for path in tracked() if path.split("/")[0] in LINKS}
    assert {name for name in found if ".dist-info/" not in name} == wanted
    assert {"megatron_refine/slurm/job.sh", "megatron_refine/configs/models/lact_tiny.yaml"} <= wanted
    licenses = {name.rpartition("/")[2] for name in found if ".dist-info/" in name}
    assert {"LICENSE", "NOTICE", "entry_points.txt"} <= licenses


@pytest.mark.slow
def test_every_form_of_the_project_gives_the_same_wheel(tmp_path: Path) -> None:
    """A clone, an archive, an sdist of either, and an sdist of what an sdist holds."""
    clone = tmp_path / "clone"
    git("clone", "--quiet", str(ROOT), str(clone))
    sources = {"clone": clone, "archive": archive(tmp_path / "archive")}
    for name, source in (("sdist", clone), ("sdist of an sdist", tmp_path / "sdist")):
        with tarfile.open(build("sdist", source, tmp_path / f"{name} file")) as tar:
            tar.extractall(tmp_path / f"{name} unpacked", filter="data")
        (folder,) = (tmp_path / f"{name} unpacked").iterdir()
        sources[name] = folder.rename(tmp_path / name)
    first, *others = (contents(build("wheel", source, tmp_path / f"{name} wheel")) for name, source in sources.items())
    for name, other in zip([*sources][1:], others, strict=True):
        assert other.keys() == first.keys(), name
        assert [key for key in first if first[key] != other[key]] == [], name


@pytest.mark.slow
def test_an_sdist_is_a_checkout(tmp_path: Path) -> None:
    source = archive(tmp_path / "source")
    (source / "runs").mkdir()
    (source / "runs/metrics.jsonl").write_text("{}\n", encoding="utf-8")  # of the user, and none of ours
    with tarfile.open(build("sdist", source, tmp_path / "out")) as tar:
        members = {member.name.partition("/")[2]: member for member in tar.getmembers() if not member.isdir()}
    made = {name for name in members if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    assert members.keys() - made == tracked()
    for name in LINKS:
        link = members[f"megatron_refine/{name}"]
        assert link.issym() and link.linkname == f"../{name}"


@pytest.mark.slow
def test_an_installed_wheel_explains_itself_and_finds_its_presets(tmp_path: Path) -> None:
    """Far from any checkout."""
    wheel = build("wheel", archive(tmp_path / "source"), tmp_path / "out")
    site, away = tmp_path / "site", tmp_path / "away"
    shutil.rmtree(tmp_path / "source")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(wheel)], check=True)
    away.mkdir()
    runs.write_config(away, away / "cache")
    environment = os.environ | {"PYTHONPATH": str(site)}
    dry_run = ["--config", "run.yaml", "model=lact_tiny", "refine.reward=cosine", "--dry-run"]
    for line, words in (
        (["-c", "import megatron_refine; print(megatron_refine.__file__)"], str(site)),
        ([str(site / "bin/megatron-refine"), "--version"], f"megatron-refine {__version__}"),
        (["-m", "megatron_refine", "train", "--help"], "--config"),
        (["-m", "megatron_refine", "train", *dry_run], "memory of a rank"),
    ):
        done = subprocess.run(
            [sys.executable, *line], cwd=away, env=environment, capture_output=True, encoding="utf-8", timeout=300
        )
        assert done.returncode == 0 and words in done.stdout, done.stdout + done.stderr


def test_a_clone_without_links_is_refused_and_mended_as_the_message_says(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    git("clone", "--quiet", "-c", "core.symlinks=false", str(ROOT), str(clone))
    assert (clone / "megatron_refine/models").is_file(), "git wrote a link in spite of core.symlinks=false"
    line = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(line, cwd=clone, capture_output=True, encoding="utf-8")
    assert done.returncode == 1 and done.stdout == ""
    message, remedy = done.stderr.splitlines()
    assert message.startswith("megatron_refine/models: must be a link to ../models, and is no folder")
    subprocess.run(["bash", "-euc", remedy], cwd=clone, check=True)
    assert [os.readlink(clone / "megatron_refine" / name) for name in LINKS] == [f"../{name}" for name in LINKS]
    done = subprocess.run(line, cwd=clone, capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.strip() and "Error" not in done.stderr
