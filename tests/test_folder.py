"""The run folder: wandb offline, and logs of each attempt."""

from pathlib import Path

from megatron_refine.report.folder import RunFolder
from tests.parity import small_config


def test_wandb_offline_writes_into_the_run_folder(tmp_path: Path) -> None:
    shown: list[str] = []
    folder = RunFolder(small_config(tmp_path, "run.wandb=offline"), 0, 10, shown.append)
    folder.record({"step": 1, "train/loss": 2.0, "perf/tokens_per_sec": 10.0, "time/step": 1.0})
    folder.finish()
    assert shown[0].startswith("step 1/10 loss 2.00")
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert (tmp_path / "run" / "logs" / "attempt_1" / "train.log").read_text(encoding="utf-8").startswith(shown[0])
