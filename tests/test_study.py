"""The study: texts that ask for what they store, the control's rewards, the statistics, and the whole of it, small."""

import json
import os
import re
from collections import Counter
from pathlib import Path
from random import Random
from statistics import fmean

import pytest
import torch
import yaml

from megatron_refine.cli import study
from megatron_refine.config import ConfigError
from megatron_refine.config.load import read_as
from megatron_refine.files import read, write_rows
from megatron_refine.step.reward import binary
from megatron_refine.study.documents import QUERY, STORE, Documents, Language
from megatron_refine.study.findings import Difference, holm, no_worse, sign_flip
from megatron_refine.study.plan import Plan, bases, continuations, read_plan
from megatron_refine.study.rewards import shuffled
from megatron_refine.study.run import _left, finished
from tests import runs
from tests.zygote import Zygote

ROOT = Path(__file__).parents[1]
PLANS = sorted(path.name for path in (ROOT / "configs/study").glob("*.yaml") if "out:" in path.read_text("utf-8"))


def test_a_text_asks_once_for_each_value_that_it_stores() -> None:
    sizes = Documents()
    language, rng = Language(sizes, 3), Random("x")
    for text in (language.text(rng) for _ in range(50)):
        assert len(text.words) == sizes.length and set(text.words) <= set(sizes.words)
        items = {kind: [i for i, word in enumerate(text.words) if word == kind] for kind in (STORE, QUERY)}
        stored, asked = (
            [tuple(text.words[i + 1 : i + 2 + sizes.span]) for i in items[kind]] for kind in (STORE, QUERY)
        )
        assert len(set(stored)) == sizes.pairs and sorted(stored) == sorted(asked)
        assert max(items[STORE]) < min(items[QUERY]) and text.questions == [i + 2 for i in items[QUERY]]


def test_filler_follows_its_chain() -> None:
    language, rng = Language(Documents(), 0), Random("x")
    pairs = Counter[tuple[str, str]]()
    for _ in range(200):
        words = language.text(rng).words
        pairs.update((a, b) for a, b in zip(words, words[1:], strict=False) if a[0] == b[0] == "f")
    assert all(b in language.successors[a] for a, b in pairs)
    likely = sum(number for (a, b), number in pairs.items() if b == language.successors[a][0])
    assert likely / pairs.total() == pytest.approx(0.7, abs=0.02)
    assert Language(Documents(), 0).successors == language.successors != Language(Documents(), 1).successors


def test_shuffled_rewards_are_those_of_their_group_and_say_nothing_of_a_rollout() -> None:
    torch.manual_seed(0)
    tokens, truth = torch.randint(0, 3, (500, 4, 4, 5)), torch.randint(0, 3, (500, 4, 5))
    empty = torch.empty(0)
    true, dealt = binary(tokens, truth, empty, empty), shuffled(tokens, truth, empty, empty)
    assert torch.equal(true.sort(-1).values, dealt.sort(-1).values)
    apart = [x - x.mean(-1, keepdim=True) for x in (true, dealt)]
    correlation = (apart[0] * apart[1]).sum() / (apart[0] * apart[0]).sum()
    assert abs(float(correlation)) < 0.06  # 8,000 rollouts: four standard errors


def test_the_page_has_the_prose_of_its_template() -> None:
    template, page = (read(ROOT / f"docs/learning.md{end}") for end in (".in", ""))
    place = 0
    for prose in re.split(r"\{\w+\}", template):
        place = page.find(prose, place) + len(prose)
        assert place >= len(prose), f"docs/learning.md lacks {prose[:80]!r}; write it anew with make study"


def test_statistics() -> None:
    found = Difference.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.mean, found.n) == (3.0, 5) and found.half == pytest.approx(2.776 * 0.7071, rel=1e-3)
    assert found.p == 1 / 32 == sign_flip([5, 1, 2, 9, 3])
    assert sign_flip([-1.0, 1.0]) == 0.75 and sign_flip([-1.0, -2.0]) == 1.0 and sign_flip([0.0, 0.0]) == 1.0
    assert holm([0.03, 0.01, 0.04]) == pytest.approx([0.06, 0.03, 0.06]) and holm([0.9, 0.8]) == [1.0, 1.0]
    narrow = Difference(-0.001, 0.002, 0.5, 5)
    assert no_worse(narrow, -0.01) and not no_worse(narrow, -0.002) and no_worse(narrow, 0.005)
    assert not no_worse(narrow, 0.0005)


@pytest.mark.parametrize("name", PLANS)
def test_shipped_studies_can_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = read_plan(Path(f"configs/study/{name}"))
    every = [*bases(plan), *continuations(plan)]
    assert len({run.folder for run in every}) == len(every)
    seeds = {(run.base, run.seed, bool(run.arm)): run.config(plan).run.seed for run in every}
    assert len(set(seeds.values())) == len({(base, seed) for base, seed, _ in seeds}), "bases share their draws"
    for run in every:
        config = run.config(plan)
        assert config.eval.selection == "uniform" and plan.documents.length == config.data.seq_length
        assert config.eval.sequences == plan.documents.held_out
        assert config.eval.examples == plan.documents.held_out * plan.documents.asked
        assert len(plan.documents.words) == config.model.vocab_size


def test_bad_plans_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "configs/study/small.yaml").read_text(encoding="utf-8").replace("runs/", f"{tmp_path}/")
    for old, new, said in (
        ("against: ntp\n", "against: npt\n", "contrasts: npt: no such arm; there are ntp, ntp + refine"),
        ("refine.nsp_coef: 0.2", "refine.nsp_coeff: 0.2", "refine.nsp_coeff"),
        ("bases: 2", "bases: 1", "bases"),
    ):
        path = tmp_path / "plan.yaml"
        path.write_text(text.replace(old, new), encoding="utf-8")
        assert study.main([str(path)]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    path.write_text(text, encoding="utf-8")
    read_plan(path)
    path.write_text(text.replace("seeds: 1", "seeds: 2"), encoding="utf-8")
    with pytest.raises(ConfigError, match="is of another plan"):
        read_plan(path)
    path.write_text(text, encoding="utf-8")
    record = next(tmp_path.rglob("plan.json"))
    record.write_text("", encoding="utf-8")
    assert study.main([str(path)]) == 2
    assert "plan.json: damaged: empty; delete it or restore it" in capsys.readouterr().err


def test_a_file_that_changed_since_the_first_runs_is_refused(tmp_path: Path) -> None:
    """Else finished runs of the old one would be compared with runs of the new."""
    small, base = ROOT / "configs/study/small.yaml", tmp_path / "base.yaml"
    text = small.read_text(encoding="utf-8").replace("runs/", f"{tmp_path}/")
    name = read_as(small, Plan).config[0]
    base.write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    path = tmp_path / "plan.yaml"
    path.write_text(text.replace(name, str(base)), encoding="utf-8")
    read_plan(path)
    read_plan(path)
    base.write_text(base.read_text(encoding="utf-8") + "# changed\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"base\.yaml has changed since the runs in .*; restore it, or choose a new"):
        read_plan(path)


def trained(folder: Path, words: list[str]) -> int:
    """On a rank: the training command, started in a folder."""
    os.chdir(folder)
    return runs.command(words).code


@pytest.mark.slow
def test_the_small_study_from_beginning_to_end(
    ranks: Zygote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With one of its models and fewer steps. True rewards beat shuffled ones; what is said is in the metrics."""
    monkeypatch.chdir(tmp_path)
    tree = yaml.safe_load((ROOT / "configs/study/small.yaml").read_text(encoding="utf-8"))
    tree["start"]["train.steps"], tree["continued"]["train.steps"] = 24, 8
    del tree["models"]["DeltaNet"]
    tree["arms"]["ntp"] = {"keys": {"refine.start_step": 8}}
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    started = list[str]()

    def train(words: list[str], log: Path) -> int:
        started.append(log.stem)
        if len(started) == 6:
            return 75  # as one that is stopped
        return int(ranks(1, trained, timeout=600, folder=tmp_path, words=words)[0])

    command = [str(path), "--jobs", "1"]
    assert study.main(command, train) == 1
    assert "ended with code 75" in capsys.readouterr().err
    assert len(started) <= 7  # one more may have begun by then; the others are not
    assert study.main(command, train) == 0 and len(started) == 2 * 5 + 1  # the stopped one twice, the others once
    ends = finished(read_plan(path))
    assert len(ends) == 2 * 5
    reward = {
        arm: fmean(last["eval/reward_mean"] for run, _, last in ends if run.arm == arm)
        for arm in ("refine alone", "refine alone, shuffled")
    }
    assert reward["refine alone"] > reward["refine alone, shuffled"] + 0.002
    for run, first, last in ends:  # every run of a base starts from it
        if run.arm:
            base = next(row for other, _, row in ends if not other.arm and other.home == run.home)
            assert first["eval/ntp_loss"] == pytest.approx(base["eval/ntp_loss"], rel=1e-5)
            assert last["step"] == 8
    text = (tmp_path / "runs/study_small/study.md").read_text(encoding="utf-8")
    assert f"| {100 * ends[0][2]['task/valid']:.2f} % |" in text and "Gated DeltaNet: refine alone, less" in text
    assert json.loads((tmp_path / "runs/study_small/plan.json").read_text("utf-8"))["bases"] == 2


def test_a_base_without_its_checkpoint_is_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where arms are to go on from it: its last evaluation is written before its last save."""
    monkeypatch.chdir(tmp_path)
    plan = read_plan(ROOT / "configs/study/small.yaml")
    every = list(bases(plan))
    for run in every:
        write_rows(run.folder / "metrics.jsonl", [{"step": n, "eval/ntp_loss": 1.0} for n in (0, 40)])
    saved = every[0].folder / "checkpoints/step_0000040"
    saved.mkdir(parents=True)
    (saved / "COMPLETE").touch()
    assert _left(plan, every) == every[1:]
    for run in continuations(plan):
        write_rows(run.folder / "metrics.jsonl", [{"step": n, "eval/ntp_loss": 1.0} for n in (0, 20)])
    assert _left(plan, every) == []
