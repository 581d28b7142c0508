"""Whole runs of the training command on real text: kills, signals, layouts, seeds, the run folder, the dry run."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from signal import SIGKILL, SIGTERM, SIGUSR1, Signals
from typing import Any

import pytest

from megatron_refine.report.metrics import KEYS
from tests import runs
from tests.lanes import short
from tests.rank_report import RankError
from tests.runs import TP2, Fault

ROOT = Path(__file__).parents[1]
LAYOUTS: dict[int, tuple[str, ...]] = {1: (), 2: TP2}
EVERY_3 = {"every": 3}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: Any) -> Path:
    """The packed text, shared by all runs."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def uninterrupted(ranks: Any, cache: Path, tmp_path_factory: Any) -> Any:
    """By world size: rows and draws of a run of six steps."""

    @functools.cache
    def run(world: int) -> Any:
        folder = tmp_path_factory.mktemp(f"world_{world}")
        arguments = ["--config", str(runs.write_config(folder, cache)), *LAYOUTS[world]]
        ends = ranks(world, runs.command, arguments=arguments, record=folder / "draws", saves=False)
        assert [end.code for end in ends] == [0] * world
        return runs.rows(folder), runs.draws(folder / "draws")

    return run


def check_same_run(folder: Path, expected: Any, stopped_after: int) -> None:
    """Two attempts are bit-equal to one; draws of a step that the first did not finish count too."""
    rows, draws = expected
    assert runs.rows(folder) == rows and [row["step"] for row in rows] == [*range(7)]
    assert len(draws) == 6 * 2  # micro-batches
    first, second = runs.draws(folder / "first"), runs.draws(folder / "second")
    assert len(first) >= 2 * stopped_after and first == draws[: len(first)]
    assert second == draws[2 * stopped_after :]
    assert sorted(p.name for p in (folder / "run" / "logs").iterdir()) == ["attempt_1", "attempt_2"]


@pytest.mark.parametrize("world", short([1, 2], lambda world: world == 2))
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    ranks: Any, tmp_path: Path, cache: Path, uninterrupted: Any, world: int
) -> None:
    """SIGKILL in step 4, between rollout and update: bit-equal losses, rewards, gradient norms and draws."""
    config = runs.write_config(tmp_path, cache, checkpoint=EVERY_3)
    job = functools.partial(ranks, world, runs.command, arguments=["--config", str(config), *LAYOUTS[world]])
    with pytest.raises(RankError, match=f"rank {world - 1} of {world} failed first: killed by SIGKILL"):
        job(fault=Fault(4, SIGKILL, rank=world - 1), record=tmp_path / "first")
    assert [row["step"] for row in runs.rows(tmp_path)][-1] == 3
    ends = job(record=tmp_path / "second", saves=world == 1)  # the last checkpoint costs seconds
    assert [end.code for end in ends] == [0] * world
    assert f"run {tmp_path / 'run'}: midtrain step 3/6" in ends[0].out
    check_same_run(tmp_path, uninterrupted(world), stopped_after=3)


@pytest.mark.parametrize("world, number", short([(1, SIGUSR1), (2, SIGTERM)], lambda world, number: world == 1))
def test_a_signal_saves_and_asks_to_be_run_again(
    ranks: Any, tmp_path: Path, cache: Path, uninterrupted: Any, world: int, number: Signals
) -> None:
    """To the last rank alone, in step 2, where no checkpoint is due."""
    config = runs.write_config(tmp_path, cache, checkpoint=EVERY_3)
    job = functools.partial(ranks, world, runs.command, arguments=["--config", str(config), *LAYOUTS[world]])
    ends = job(fault=Fault(2, number, rank=world - 1), record=tmp_path / "first")
    assert [end.code for end in ends] == [75] * world
    name = number.name if world == 1 else "another rank"  # the main rank did not get it
    assert f"stopped by {name} after step 2: run the same command to go on" in ends[0].out
    assert (tmp_path / "run/checkpoints/step_0000002/COMPLETE").exists()
    ends = job(record=tmp_path / "second", saves=False)
    assert [end.code for end in ends] == [0] * world and "step 2/6" in ends[0].out
    check_same_run(tmp_path, uninterrupted(world), stopped_after=2)


def test_the_seed_decides_the_run(ranks: Any, tmp_path: Path, cache: Path, uninterrupted: Any) -> None:
    rows, draws = uninterrupted(1)
    for seed in (1, 2):
        folder = tmp_path / str(seed)
        folder.mkdir()
        arguments = ["--config", str(runs.write_config(folder, cache)), f"run.seed={seed}"]
        assert ranks(1, runs.command, arguments=arguments, record=folder / "draws", saves=False)[0].code == 0
        assert (runs.rows(folder) == rows) == (seed == 1)
        assert (runs.draws(folder / "draws") == draws) == (seed == 1)


@pytest.fixture(scope="module")
def warm(ranks: Any, cache: Path, tmp_path_factory: Any) -> Path:
    """A checkpoint after 40 steps of next-token prediction."""
    folder = tmp_path_factory.mktemp("warm")
    train = {"steps": 40, "micro_batch_size": 4}
    arguments = ["--config", str(runs.write_config(folder, cache, train=train, refine={"start_step": 40}))]
    assert ranks(1, runs.command, arguments=arguments)[0].code == 0
    return folder / "run/checkpoints/step_0000040"


def flat(value: Any) -> list[int]:
    return [x for part in value for x in flat(part)] if isinstance(value, list) else [value]


@pytest.mark.slow
def test_twenty_steps_draw_the_same_at_tp2(ranks: Any, tmp_path: Path, cache: Path, warm: Path) -> None:
    """Rounding alone differs between the layouts; Adam and the draws near a boundary make it grow."""
    found = []
    for world, layout in LAYOUTS.items():
        folder = tmp_path / str(world)
        folder.mkdir()
        train = {"steps": 20, "micro_batch_size": 4}
        config = runs.write_config(folder, cache, checkpoint={"load": str(warm)}, train=train)
        arguments = ["--config", str(config), *layout]
        ends = ranks(world, runs.command, arguments=arguments, record=folder / "draws", saves=False)
        assert [end.code for end in ends] == [0] * world
        found.append((runs.rows(folder), runs.draws(folder / "draws")))
    (rows, draws), (other_rows, others) = found
    assert [d["step"] for d in draws] == [d["step"] for d in others] == [*range(1, 21)]
    for key in ("positions", "tokens"):
        assert draws[0][key] == others[0][key]
        here, there = ([x for d in run for x in flat(d[key])] for run in (draws, others))
        share = sum(x == y for x, y in zip(here, there, strict=True)) / len(there)
        assert share >= 0.99, f"{share:.2%} of {key} are the same"
    for row, other in zip(rows[-20:], other_rows[-20:], strict=True):
        for key in ("train/loss", "train/ntp_loss"):
            assert other[key] == pytest.approx(row[key], rel=1e-3), (row["step"], key)


def test_pipeline_of_two_predicts_next_tokens_as_one_rank_does(ranks: Any, tmp_path: Path, cache: Path) -> None:
    losses = []
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        config = runs.write_config(folder, cache, refine={"enabled": False}, parallel={"pp": world})
        ends = ranks(world, runs.command, arguments=["--config", str(config)], saves=False)
        assert [end.code for end in ends] == [0] * world and "report" in ends[0].out
        losses.append([row["train/loss"] for row in runs.rows(folder)[1:]])
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)  # fp32 sums in another order, through six Adam steps


@pytest.fixture(scope="module")
def whole(ranks: Any, cache: Path, tmp_path_factory: Any) -> Any:
    """(folder, command, its end) of a run of three NTP and three REFINE steps with evaluations and checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    evaluation = {"every": 2, "sequences": 4}
    config = runs.write_config(folder, cache, eval=evaluation, refine={"start_step": 3}, checkpoint={"every": 2})
    job = functools.partial(ranks, 1, runs.command, arguments=["--config", str(config)])
    return folder, job, job(plots=True)[0]


def test_the_run_folder_holds_all_of_the_run(whole: Any) -> None:
    folder, _, end = whole
    assert end.code == 0 and not end.err
    run = folder / "run"
    names = {"config.yaml", "metrics.jsonl", "checkpoints", "logs", "report.html", "samples.json", "tokenizer.json"}
    names |= {"OWNER", ".lock"}  # which attempt writes
    assert {p.name for p in run.iterdir()} == names
    kept = {"step_0000004", "step_0000006", "latest"}  # checkpoint.keep=2
    assert {p.name for p in (run / "checkpoints").iterdir()} == kept
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == [*range(7)]
    assert [row["step"] for row in rows if "eval/ntp_loss" in row] == [0, 2, 3, 4, 6]
    # no servers, no prompts, no GPU here
    other = ("engine/", "time/offload", "train/answer_loss", "time/answer", "perf/mfu")
    native = {key for key in KEYS if not key.startswith(other)}
    assert rows[6].keys() == native - {"time/checkpoint"}
    assert rows[5].keys() == {key for key in native if not key.startswith("eval/")}  # step 4 was saved
    for row in rows[1:4]:
        assert not any(key.startswith("rollout/") for key in row) and "train/nsp_loss" not in row
        assert {"train/loss", "train/ntp_loss", "train/grad_norm", "train/lr", "time/step"} <= row.keys()
    assert [row["consumed_samples"] for row in rows] == [4 * step for step in range(7)]
    samples = json.loads((run / "samples.json").read_text(encoding="utf-8"))
    assert samples["step"] == 6 and len(samples["rollouts"]) == 4 * 2
    report = (run / "report.html").read_text(encoding="utf-8")
    assert "<html" in report and "<path" in report.partition("losses")[2]


def test_the_screen_tells_the_run(whole: Any) -> None:
    folder, _, end = whole
    input_lines, begin, rest = end.out.partition("run ")
    start = r"importing .*\ndata\.paths: 2 text\ndata\.valid_paths: 1 text\n(training a tokenizer .*\n)?tokenizer .*\n"
    assert re.fullmatch(start + r"(tokenizing .*\n)?building delta_net, .*, on 1 rank\n", input_lines)
    lines = (begin + rest).splitlines()
    assert lines[0] == f"run {folder / 'run'}: midtrain step 0/6, 1 rank, fused update"
    assert lines[1] == "fp32, torch AdamW; delta rule: torch; linear layers: local; recomputed: nothing"
    assert lines[2].startswith("eval step 0: ntp 6.") and " reward " in lines[2] and " greedy_match " in lines[2]
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == [f"{i}/6" for i in range(1, 7)]
    assert all("reward" not in line and "tok/s" in line and " lr 1e-3 grad " in line for line in steps[:3])
    assert all(" reward 0." in line and "±" in line and " gap " in line for line in steps[3:])
    assert all("nan" not in line for line in lines)
    assert [line.split()[0] for line in lines if line.startswith(("before", "after"))] == ["before", "after", "after"]
    assert lines[-1] == f"report {folder / 'run/report.html'}"
    assert (folder / "run/logs/attempt_1/train.log").read_text(encoding="utf-8") == begin + rest


def test_a_finished_run_started_again_does_nothing(whole: Any) -> None:
    folder, job, _ = whole
    run = folder / "run"
    kept = [run / "metrics.jsonl", *sorted((run / "checkpoints").rglob("*.distcp"))]
    before = [path.read_bytes() for path in kept]
    end = job()[0]
    assert end.code == 0 and not any(line.startswith("step ") for line in end.out.splitlines())
    assert [path.read_bytes() for path in kept] == before and (run / "logs/attempt_2").exists()


def test_dry_run_is_light_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    config = runs.write_config(tmp_path, tmp_path / "cache")
    code = (
        "import sys; from megatron_refine.train import main; code = main(); "
        "print('heavy:', *sorted({'torch', 'megatron', 'wandb'} & sys.modules.keys())); sys.exit(code)"
    )
    words = ["--dry-run", "train.steps=7", "refine.reward=cosine"]  # a reward of one's own is tried, on tensors
    command = [sys.executable, "-c", code, "--config", str(config), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0 and not done.stderr
    assert "steps: 7" in done.stdout and done.stdout.splitlines()[-1] == "heavy:"
    for word in ("parameters", "memory", "FLOP"):
        assert word in done.stdout, word
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]
