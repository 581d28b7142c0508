"""Ranks killed at random moments, saves included, and started again: the run is the one that nobody disturbed.

Every other attempt saves beside its steps.

`make test` kills three times, `make test-chaos KILLS=20 SEED=1` as often as it is told.
"""

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_refine.checkpoint.manifest import TEMPORARY
from tests import runs
from tests.rank_report import RankError

KILLS = int(os.environ.get("CHAOS_KILLS", 3))
SEED = int(os.environ.get("CHAOS_SEED", random.randrange(1 << 30)))
SECTIONS: dict[str, dict[str, Any]] = {
    "train": {"steps": 10, "micro_batch_size": 2}, "checkpoint": {"every": 2, "keep": 2},
}  # fmt: skip


def doomed(arguments: list[str], victim: int, seconds: float) -> Any:
    """On a rank: the training command, in which the victim is killed after so many seconds."""
    if int(os.environ["RANK"]) == victim:
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    return runs.command(arguments)


@pytest.mark.slow
@pytest.mark.timeout(120 + 60 * KILLS)
def test_killed_at_random_moments(ranks: Any, tmp_path: Path, capsys: Any) -> None:
    """Bit-equal metrics; a kill never leaves a checkpoint that the next attempt cannot read, and none is left half
    written in the end."""
    rng, folders = random.Random(SEED), (tmp_path / "undisturbed", tmp_path / "chaos")
    for folder in folders:
        folder.mkdir()
    lines = [
        ["--config", str(runs.write_config(folder, tmp_path / "data", **SECTIONS)), *runs.TP2] for folder in folders
    ]
    begin = time.monotonic()
    assert [end.code for end in ranks(2, runs.command, arguments=lines[0])] == [0, 0]
    whole = time.monotonic() - begin
    root, kills, saving = folders[1] / "run/checkpoints", 0, 0
    for attempt in range(10 * KILLS):
        if kills == KILLS:
            break
        victim, seconds = rng.randrange(2), rng.uniform(0.1, 0.7 * whole)
        words = [*lines[1], f"checkpoint.async={'true' if attempt % 2 else 'false'}"]
        try:
            ends = ranks(2, doomed, arguments=words, victim=victim, seconds=seconds)
            assert [end.code for end in ends] == [0, 0], (SEED, attempt, ends)  # done before its time had come
            (root / "latest").unlink()  # and once more from the beginning
            for folder in root.iterdir():
                for file in folder.rglob("*"):
                    file.is_file() and file.unlink()
        except RankError as error:
            assert f"rank {victim} of 2 failed first: killed by SIGKILL" in str(error), (SEED, attempt, error)
            assert "Traceback" not in str(error).split("--- rank")[0]
            kills += 1
            saving += any(root.glob(f"{TEMPORARY}*"))
    assert kills == KILLS, SEED
    ends = ranks(2, runs.command, arguments=lines[1])
    assert [end.code for end in ends] == [0, 0], (SEED, ends)
    assert runs.rows(folders[1]) == runs.rows(folders[0]), SEED
    assert {path.name for path in root.iterdir()} == {"step_0000008", "step_0000010", "latest"}
    with capsys.disabled():
        print(f" {kills} kills, {saving} of them in a save, seed {SEED} ", end="")
