"""Whole runs of the training command with SGLang servers of their own."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests import sglang_lane as lane
from tests.zygote import Zygote

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(1800)]
ENGINE = {"kind": "sglang", "python": str(lane.PYTHON), "args": lane.SERVER_ARGS, "request_timeout": 20.0}


def train_and_kill(arguments: list[str], kill_at: int) -> runs.End:
    """On a rank: the training command; before its `kill_at`-th exploration the server is killed."""
    from megatron_refine.engine.sglang import SGLangEngine

    rollout, calls = SGLangEngine.rollout, 0

    def killing(self: Any, request: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == kill_at and self.fleet:
            os.killpg(self.fleet.servers[0].process.pid, signal.SIGKILL)
        return rollout(self, request)

    SGLangEngine.rollout = killing  # type: ignore[method-assign]
    return runs.command(arguments, saves=False)


@pytest.mark.parametrize(("mode", "tp", "kill_at", "lag"), [("distributed", 1, 2, 0), ("disk", 2, 0, 1)])
def test_a_run_ends_with_rollouts_of_its_own_weights(
    ranks: Zygote, tmp_path: Path, mode: str, tp: int, kill_at: int, lag: int
) -> None:
    """New weights at every step, with a server of tp 2; also where a server is killed under way, during an offload; and
    where it writes while the trainer updates."""
    sections: dict[str, dict[str, Any]] = {
        "run": {"timeout_minutes": 5.0},
        "train": {"steps": 4, "micro_batch_size": 4},
        "engine": ENGINE
        | {"tp": tp, "sync": mode, "offload": bool(kill_at), "lag": lag, "importance_cap": 2.0 * lag},
    }
    path = runs.write_config(tmp_path, tmp_path / "data", **sections)
    arguments = ["--config", str(path), *runs.TP2]
    ends = ranks(2, train_and_kill, 1500, arguments=arguments, kill_at=kill_at)
    assert [end.code for end in ends] == [0, 0], ends[0].err
    steps = [row for row in runs.rows(tmp_path) if "rollout/logprob_gap_max" in row]
    assert [row["rollout/weight_version"] for row in steps] == ([0, 0, 1, 2] if lag else [0, 1, 2, 3])
    gaps = [row["rollout/logprob_gap_max"] for row in steps]
    own, older = (gaps[:1], gaps[1:]) if lag else (gaps, [])
    assert max(own) < lane.TOLERANCE and all(lane.TOLERANCE < gap < 0.5 for gap in older), gaps
    assert all((row.get("engine/offloaded_bytes", 0) > 0) == bool(kill_at) for row in steps)
    for key in ("engine/recoveries", "engine/restarts"):
        assert [row[key] for row in steps] == [int(bool(kill_at) and i + 1 >= kill_at) for i in range(4)], ends[0].out
