"""A locale that is not UTF-8: the same corpus, a run from its start to its report, all of it in UTF-8."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_refine.data.corpus import find_corpus
from tests import runs
from tests.zygote import DEADLINE

PROGRAM = """
import os, sys
from pathlib import Path
from megatron_refine.data.corpus import find_corpus
from megatron_refine.files import speak_utf8
from megatron_refine.train import main
from megatron_refine.cli import prepare

assert sys.getfilesystemencoding() == "ascii", sys.getfilesystemencoding()
config, texts = sys.argv[1:]
print(find_corpus([os.path.dirname(texts) + "/" + "\\u2603"], "text", "k").fingerprint(Path(texts, ".cache")))
speak_utf8()
code = prepare.main(["--config", config])
sys.exit(code or main(["--config", config]))
"""


@pytest.mark.slow
def test_a_run_in_a_locale_without_utf8(tmp_path: Path) -> None:
    folder = tmp_path / "☃"
    folder.mkdir()
    for i in range(4):
        words = " ".join(f"né{j * j * (i + 1) % 97} ☃{j % 13}" for j in range(400))
        (folder / f"ü{i}.txt").write_text(words, encoding="utf-8")
    data = {"paths": [str(folder)], "valid_paths": [], "cache_dir": str(tmp_path / "cache")}
    data |= {"seq_length": 96, "valid_fraction": 0.3}
    sections = {"train": runs.TREE["train"] | {"steps": 1}, "eval": {"sequences": 2}, "checkpoint": {"keep": 1}}
    model = runs.MODEL | {"vocab_size": 270}
    config = runs.write_config(tmp_path, tmp_path / "cache", data=data, model=model, **sections)
    environment = os.environ | {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(config), str(folder)], env=environment, check=False,
        capture_output=True, timeout=DEADLINE, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    out, err = done.stdout.decode("utf-8"), done.stderr.decode("utf-8")
    assert done.returncode == 0 and "Traceback" not in err, err + out
    assert out.startswith(find_corpus([str(folder)], "text", "k").fingerprint(tmp_path))
    assert "data.paths: 4 text\n" in out and "±" in out  # the step's line
    assert "☃" in "".join(r["truth"] for r in json.loads((tmp_path / "run/samples.json").read_bytes())["rollouts"])
    for name in ("report.html", "config.yaml", "metrics.jsonl", "tokenizer.json", "logs/attempt_1/train.log"):
        (tmp_path / "run" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("start", [["-m", "megatron_refine", "generate"], ["tools/generate.py"]], ids=["-m", "tool"])
def test_words_of_the_command_line_are_utf8_in_a_locale_of_ascii(tmp_path: Path, start: list[str]) -> None:
    """A model's folder is found by its name."""
    (tmp_path / "ü").mkdir()
    environment = os.environ | {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    done = subprocess.run([sys.executable, *start, f"{tmp_path}/ü", "--prompt", "é"], env=environment,
                          capture_output=True, timeout=DEADLINE, cwd=Path(__file__).parents[1])  # fmt: skip
    assert done.returncode == 2 and done.stderr.decode("utf-8").startswith(f"{tmp_path}/ü: "), done.stderr
