"""Two releases of Megatron-Core: what the older one began goes on with the newer one. `make test-next`."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_refine.platform.megatron.version import VERSION, since
from tests import runs

ROOT = Path(__file__).parents[1]
OLDER = ROOT / ".venv/bin/python"  # Megatron-Core 0.16 on Python 3.11
pytestmark = [
    pytest.mark.skipif(not since(0, 17), reason=f"needs Megatron-Core 0.17 or later, not {VERSION}: make test-next"),
    pytest.mark.timeout(900),
]


def train(python: Path | str, *words: str) -> subprocess.CompletedProcess[str]:
    """The training command on two ranks."""
    line = [str(python), "-m", "megatron_refine", "train", "--ranks", "2", *words]
    return subprocess.run(line, cwd=ROOT, capture_output=True, encoding="utf-8")


def test_the_quickstart_ends_with_its_table(tmp_path: Path) -> None:
    words = ("train.steps=10", "refine.start_step=5", f"run.dir={tmp_path / 'run'}", "checkpoint.every=5")
    done = train(sys.executable, "--config", "configs/quickstart.yaml", *words, "eval.sequences=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "after REFINE" in done.stdout and "step 10/10" in done.stdout
    assert "DEPRECATED" not in done.stdout + done.stderr and "Warning" not in done.stderr


@pytest.mark.skipif(not (ROOT / ".venv/lib/python3.11").is_dir(), reason="needs Python 3.11 in .venv: make test-next")
def test_a_run_of_the_older_release_goes_on_with_the_same_numbers(tmp_path: Path) -> None:
    """Three steps there and three here: the metrics of six steps there. The other way is refused in one line."""
    found = {}
    for name in ("whole", "handed over"):
        (tmp_path / name).mkdir()
        config = runs.write_config(tmp_path / name, tmp_path / "data", train={"steps": 6, "micro_batch_size": 1})
        line = ["--config", str(config), *runs.TP2, "checkpoint.every=3"]
        first = train(OLDER, *line, *(["train.steps=3"] if name != "whole" else []))
        assert first.returncode == 0, first.stderr
        if name != "whole":
            second = train(sys.executable, *line)
            assert second.returncode == 0 and "step 4/6" in second.stdout, second.stdout + second.stderr
        found[name] = {row["step"]: row["train/loss"] for row in runs.rows(tmp_path / name) if row["step"]}
    assert found["whole"].keys() == found["handed over"].keys() == set(range(1, 7))
    assert found["handed over"] == pytest.approx(found["whole"], rel=1e-6)  # other kernels of torch's build
    back = train(OLDER, *line, "train.steps=8")
    assert back.returncode == 4 and "was written with Megatron-Core 0.17 or later" in back.stderr
    assert len(back.stderr.strip().splitlines()) == 1, back.stderr
