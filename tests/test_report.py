"""Metrics, the lines on the screen, and the report."""

import json
import math
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from typing import Any
from xml.etree import ElementTree

import pytest

from megatron_refine.cli import compare
from megatron_refine.report.html import write_report
from megatron_refine.report.metrics import KEYS, MetricsLog, Row, read
from megatron_refine.report.page import visible
from megatron_refine.report.screen import comparison, duration, eval_line, step_line
from megatron_refine.report.summary import StepTimes, milestones, sharpened, step_times

REFINE_ROW: Row = {
    "step": 12, "train/loss": 2.19, "train/ntp_loss": 2.19, "train/nsp_loss": -0.002, "rollout/reward_mean": 0.42,
    "rollout/reward_std": 0.11, "rollout/logprob_gap_mean": 1e-6, "perf/tokens_per_sec": 8100.0, "perf/mfu": 0.31,
    "time/score": 0.21, "time/rollout": 0.02, "time/update": 0.74, "time/sync": 0.0, "time/step": 1.0,
    "train/lr": 3e-4, "train/grad_norm": 0.816, "perf/peak_memory_bytes": 3 << 29,
}  # fmt: skip
EVAL: Row = {
    "step": 150, "eval/ntp_loss": 3.21, "eval/ntp_accuracy": 0.382, "eval/entropy": 3.05, "eval/reward_mean": 0.412,
    "eval/greedy_match": 0.21,
}  # fmt: skip
SCRIPT = "<script>alert(1)</script>"


def synthetic_rows(ntp_steps: int, refine_steps: int) -> list[Row]:
    """A run as the trainer logs it: steps of next-token prediction, then REFINE steps; restarted at three quarters."""
    rng, rows = Random(1), [EVAL | {"step": 0, "eval/ntp_loss": 6.9, "eval/reward_mean": 0.1}]
    total = ntp_steps + refine_steps
    for step in range(1, total + 1):
        loss = 2.2 + 4.5 * math.exp(-step / 40) + rng.gauss(0, 0.06)
        row = {
            "step": step, "consumed_samples": 16 * step, "attempt": 1 + (step > 0.75 * total), "train/loss": loss,
            "train/ntp_loss": loss, "train/grad_norm": 1.0, "train/lr": 1e-3, "perf/tokens_per_sec": 8100.0,
            "perf/mfu": None, "time/update": 0.5 + abs(rng.gauss(0, 0.02)), "time/step": 0.56,
        }  # fmt: skip
        if step > ntp_steps:
            row |= {
                "train/nsp_loss": rng.gauss(0, 0.002), "rollout/reward_mean": 0.4 + 0.001 * step + rng.gauss(0, 0.02),
                "rollout/reward_std": 0.11, "rollout/logprob_gap_mean": 2e-7 * rng.random(),
                "rollout/logprob_gap_max": 4e-6 * rng.random(), "rollout/masked_fraction": 0.125 * (step == total),
                "time/score": 0.17, "time/rollout": 0.03, "time/step": 0.75,
            }  # fmt: skip
        if step in (ntp_steps, total):
            row |= EVAL | {"step": step, "eval/ntp_loss": loss}
        rows.append(row)
    return rows


def synthetic_samples(length: int) -> dict:
    rng = Random(2)
    entropy = [2.4 + 1.2 * math.sin(t / 7) + rng.gauss(0, 0.5) for t in range(length)]
    positions = [length // 8 * chunk + rng.randrange(length // 8) for chunk in range(8)]
    texts = ((" the state of", " the state is"), ("\n    return x", "\n    return y"), ("<b>&", SCRIPT))
    rollouts = [
        {"position": position, "prefix": "def f(x):\n\tif x <", "truth": truth, "rollout": rollout, "reward": 0.4}
        for position, (truth, rollout) in zip(positions, texts, strict=False)
    ]
    rewards = [min(1.0, max(-1.0, rng.gauss(0.45, 0.15))) for _ in range(128)]
    return {"step": 200, "entropy": entropy, "positions": positions, "rollouts": rollouts, "rewards": rewards}


def write_run(folder: Path, rows: list[Row], samples: dict | None = None) -> Path:
    log = MetricsLog(folder / "metrics.jsonl")
    for row in rows:
        log.append(row)
    log.close()
    (folder / "config.yaml").write_text("model:\n  family: delta_net  # <tiny>\n", encoding="utf-8")
    if samples is not None:
        (folder / "samples.json").write_text(json.dumps(samples), encoding="utf-8")
    return folder


class Page(HTMLParser):
    """Checks that tags nest, and collects ids, headings and text."""

    VOID = ("meta", "br")

    def __init__(self, path: Path):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.headings: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.open += [tag] if tag not in self.VOID else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]

    def handle_data(self, data: str) -> None:
        self.text += data
        self.headings += [data] if self.open and self.open[-1] == "h2" else []


SECTIONS = [
    "Comparison", "Losses", "Rewards", "Entropy and selected positions", "Rollouts", "Time per stage", "Log-prob gap",
    "Restarts", "Configuration",
]  # fmt: skip


def test_keys_are_those_of_a_row() -> None:
    assert KEYS >= REFINE_ROW.keys() | EVAL.keys() | {"consumed_samples", "attempt", "perf/peak_memory_bytes"}
    assert len(KEYS) == 4 + 9 + 12 + 6 + 7 + 3 + 12


def test_metrics_round_trip_writes_what_is_not_finite_as_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    log.append({"step": 1, "train/loss": 0.1 + 0.2, "perf/mfu": None})
    log.append({"step": 2, "train/loss": math.nan, "train/grad_norm": math.inf})
    assert read(log.path) == [  # while the log is open: each row has left the process
        {"step": 1, "train/loss": 0.1 + 0.2, "perf/mfu": None},
        {"step": 2, "train/loss": None, "train/grad_norm": None},
    ]
    with pytest.raises(AssertionError, match="train/los"):
        log.append({"step": 3, "train/los": 1.0})
    assert read(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("torn", ["", '{"step": 6, "train/lo', '{"step": 6}', '{"step": 6, "train/loss": 1.', "{"])
def test_truncation_drops_later_rows_and_a_torn_line(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(f'{{"step": {step}, "train/loss": {step}.5}}\n' for step in range(6)) + torn, encoding="utf-8"
    )
    log = MetricsLog(path)
    log.truncate_after(3)
    log.append({"step": 4, "train/loss": 0.25})
    assert [row["step"] for row in read(path)] == [0, 1, 2, 3, 4]
    assert read(path)[-1]["train/loss"] == 0.25
    assert list(tmp_path.iterdir()) == [path]


def test_a_broken_line_within_the_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="metrics.jsonl:2: not a row"):
        read(path)


def test_step_line_of_a_refine_step() -> None:
    assert step_line(REFINE_ROW, 100, left=4000.0) == (
        "step 12/100 loss 2.19 ntp 2.19 nsp -0.002 reward 0.42±0.11 | lr 3e-4 grad 0.82 "
        "| 8.1k tok/s mfu 31% 1.00s mem 1.5G | score 21% rollout 2% update 74% sync 0.0s gap 1e-6 | left 67m"
    )
    odd = REFINE_ROW | {"train/nsp_loss": -1e-9, "rollout/logprob_gap_mean": 0.0, "perf/mfu": None, "train/loss": None}
    assert step_line(odd, 100) == (
        "step 12/100 loss nan ntp 2.19 reward 0.42±0.11 | lr 3e-4 grad 0.82 | 8.1k tok/s 1.00s mem 1.5G "
        "| score 21% rollout 2% update 74% sync 0.0s gap 0"
    )


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, ""), (0.002, " masked <1%"), (0.031, " masked 3%"), (1.0, " masked 100%")]
)
def test_step_line_says_how_many_rollouts_were_masked(share: float, text: str) -> None:
    assert step_line(REFINE_ROW | {"rollout/masked_fraction": share}, 100).endswith(f" gap 1e-6{text}")


@pytest.mark.parametrize("gap", [math.nan, math.inf, None])
def test_step_line_of_a_gap_that_is_not_finite(gap: float | None) -> None:
    assert step_line(REFINE_ROW | {"rollout/logprob_gap_mean": gap}, 100).endswith(" gap nan")


def test_step_line_of_an_ntp_step() -> None:
    row = {"step": 3, "train/loss": 6.789, "perf/tokens_per_sec": 812.4, "perf/mfu": 0.4, "time/step": 0.517}
    assert step_line(row, 100) == "step 3/100 loss 6.79 | lr nan grad - | 812 tok/s mfu 40% 0.52s mem -"


def test_durations_as_people_say_them() -> None:
    seconds = (4.6, 89, 100, 5900, 6100, 86_400, 200_000)
    assert [duration(s) for s in seconds] == ["5s", "89s", "2m", "98m", "1h42m", "24h00m", "2d08h"]


def test_eval_line() -> None:
    assert eval_line(EVAL) == (
        "eval step 150: ntp 3.21 accuracy 38.2% entropy 3.05 reward 0.412 greedy_match 0.21"
    )  # fmt: skip
    ntp_only = {key: value for key, value in EVAL.items() if key not in ("eval/reward_mean", "eval/greedy_match")}
    assert eval_line(ntp_only) == "eval step 150: ntp 3.21 accuracy 38.2% entropy 3.05"


def test_comparison_frames_the_parts_of_a_run() -> None:
    rows = synthetic_rows(ntp_steps=4, refine_steps=3)
    assert [(label, row["step"]) for label, row in milestones(rows)] == [
        ("before", 0), ("after NTP", 4), ("after REFINE", 7),
    ]  # fmt: skip
    times = step_times(rows)
    assert (list(times.ntp), list(times.refine)) == ([0.56] * 4, [0.75] * 3)
    lines = comparison([("before", EVAL | {"step": 0}), ("after REFINE", EVAL)], times).splitlines()
    assert lines == [
        "              step  ntp loss  accuracy   entropy    reward  greedy match",
        "before           0     3.210     38.2%      3.05     0.412          0.21",
        "after REFINE   150     3.210     38.2%      3.05     0.412          0.21",
        "NTP step 0.56 s, REFINE step 0.75 s, ratio 1.34",
    ]
    assert comparison([], StepTimes([0.5], [])) == "NTP step 0.5 s"
    later = [*synthetic_rows(ntp_steps=7, refine_steps=0), EVAL | {"step": 9}]  # the run itself ends with step 7
    assert [(label, row["step"]) for label, row in milestones(rows, later)][3:] == [("baseline", 7)]
    assert milestones([], later) == []
    assert comparison([], StepTimes([], [])) == "No step was timed"


def test_report_has_every_section_and_escapes_text(tmp_path: Path) -> None:
    (tmp_path / "logs" / "attempt_1").mkdir(parents=True)
    run = write_run(tmp_path, synthetic_rows(ntp_steps=120, refine_steps=80), synthetic_samples(400))
    page = Page(write_report(run))
    assert page.headings == SECTIONS
    assert page.tags.count("svg") == 2 * 5  # for a wide screen and a narrow one
    assert len(page.ids) == len(set(page.ids))
    assert "script" not in page.tags and SCRIPT in page.text
    assert "At most 12.5% of a step's rollouts were masked" in page.text
    assert "after REFINE" in page.text and "1 restart." in page.text and "# <tiny>" in page.text
    source = (run / "report.html").read_text(encoding="utf-8")
    named = set(re.findall(r'(?:href="#|url\(#)([^")]+)', source))  # markers of curves, and what clips them
    assert named and named <= set(page.ids), named - set(page.ids)
    assert "#0000e" not in source and "http" not in source.replace("http://www.w3.org/", "")
    assert not list(run.glob("*.tmp"))


@pytest.mark.parametrize(("ntp_steps", "refine_steps"), [(0, 0), (1, 0), (0, 1), (3, 0), (2, 1), (500, 0)])
def test_report_of_odd_runs(tmp_path: Path, ntp_steps: int, refine_steps: int) -> None:
    rows = synthetic_rows(ntp_steps, refine_steps)
    without_evaluations = [{key: row[key] for key in row if not key.startswith("eval/")} for row in rows[1:]]
    page = Page(write_report(write_run(tmp_path, without_evaluations)))
    assert page.headings == SECTIONS
    assert "No evaluation has been made." in page.text
    assert "No sample of rollouts has been saved." in page.text
    assert ("This run has no REFINE step" in page.text) == (refine_steps == 0)


def test_report_of_an_empty_folder_and_of_undefined_losses(tmp_path: Path) -> None:
    assert Page(write_report(tmp_path)).headings == SECTIONS
    rows = [row | {"train/ntp_loss": math.nan, "rollout/reward_mean": None} for row in synthetic_rows(0, 40)]
    samples = synthetic_samples(16) | {"rollouts": [], "rewards": [], "positions": []}
    assert Page(write_report(write_run(tmp_path, rows, samples))).headings == SECTIONS


def test_visible_shows_white_space_and_what_matches() -> None:
    space = '<span class="space">·</span>'
    assert visible("a <", 2) == f"<code><mark>a{space}</mark>&lt;</code>"
    assert "↵\n" in visible("\n") and "→\t" in visible("\t")


def test_runs_are_compared_in_one_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, ntp_steps in (("native", 40), ("sglang", 60)):
        log = MetricsLog(tmp_path / name / "metrics.jsonl")
        for row in synthetic_rows(ntp_steps, 20):
            log.append(row)
        log.close()
    picture, runs = tmp_path / "curves.svg", [str(tmp_path / name) for name in ("native", "sglang")]
    assert compare.main([*runs, "--out", str(picture)]) == 0
    drawn = ElementTree.fromstring(picture.read_text(encoding="utf-8"))
    texts = {element.text for element in drawn.iter() if element.tag.endswith("}text")}
    assert {"native", "sglang", "NTP loss, nats a token"} <= texts and "--blue: #" in picture.read_text(
        encoding="utf-8"
    )
    assert capsys.readouterr().out.count("after REFINE") == 2


def test_runs_of_a_label_are_one_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Draw any number of runs; leave out an evaluation that only some of them have."""
    words = []
    for number in range(8):
        name = f"{number % 2}/seed={number}"
        log = MetricsLog(tmp_path / name / "metrics.jsonl")
        for row in synthetic_rows(40, 20):
            more = {key: row[key] + 0.01 * number for key in ("eval/reward_mean",) if key in row}
            log.append(row | more)
        log.close()
        words.append(f"kind {number % 2}={tmp_path / name}")
    picture = tmp_path / "curves.svg"
    assert compare.main([*words, "--out", str(picture)]) == 0
    text = picture.read_text(encoding="utf-8")
    assert text.count(">kind 0<") == text.count(">kind 1<") == 1
    shown = capsys.readouterr().out
    rewards = [EVAL["eval/reward_mean"] + 0.01 * number for number in (0, 2, 4, 6)]
    line = f"{statistics.mean(rewards):.3f} ± {statistics.stdev(rewards):.3f}  ({rewards[0]:.3f} to {rewards[-1]:.3f})"
    assert "kind 0, 4 runs" in shown and f" {line}\n" in shown


def test_rewards_that_rise_by_sharpening_are_told() -> None:
    def framed(**after: float) -> Any:
        first = {"eval/reward_mean": 0.5, "eval/greedy_match": 0.3, "eval/entropy": 2.0}
        return [("before", {}), ("after NTP", first), ("after REFINE", {f"eval/{k}": v for k, v in after.items()})]

    told = sharpened(framed(reward_mean=0.52, greedy_match=0.28, entropy=1.9))
    assert told.startswith("sharper, not better: ") and "rose by 0.020" in told and "entropy by 0.10 nats" in told
    assert not sharpened(framed(reward_mean=0.52, greedy_match=0.31, entropy=1.9))
    assert not sharpened(framed(reward_mean=0.48, greedy_match=0.28, entropy=1.9))
    assert not sharpened(framed(reward_mean=0.52, greedy_match=0.28, entropy=1.99))
    assert not sharpened(framed(entropy=1.0)) and not sharpened(framed()[:2])


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["run"], "two folders or more"),
        (["run", "run"], "each named once"),
        (["run", "other/run"], "need labels; write LABEL=RUN_DIR"),
        (["run", "empty"], "empty: no metrics.jsonl with a step in it"),
        (["run", "broken"], "metrics.jsonl:1: not a row: damaged"),
    ],
)
def test_folders_that_cannot_be_compared(
    folders: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("run", '{"step": 1}\n'), ("other/run", '{"step": 1}\n'), ("broken", "no\nrow\n")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "metrics.jsonl").write_text(text, encoding="utf-8")
    assert compare.main([*(str(tmp_path / name) for name in folders), "--out", str(tmp_path / "x.svg")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "x.svg").exists()
