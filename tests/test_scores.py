"""An evaluation's folder: what of it counts after a change or a crash. And scores of held-out rows, in a run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_refine.config import ConfigError
from megatron_refine.eval.results import Results
from megatron_refine.eval.suite import score_table
from tests.parity import build, small_config

IDENTITY = {"weights": ["a"], "bos": None, "ends": [2]}


def results(folder: Path, said: list[str] | None = None, **identity: Any) -> Results:
    return Results(folder, IDENTITY | identity, writes=True, say=(said if said is not None else []).append)


def row(results: Results, place: int, question: list[Any], text: str = "x") -> dict[str, Any]:
    return {"place": place, "input": results.fingerprint(question), "prediction": text, "score": 0.5}


def test_an_answer_belongs_to_its_question_and_its_model(tmp_path: Path) -> None:
    first = results(tmp_path / "a")
    question = ["p", 8, ("\n",)]
    first.append("trec", [row(first, 0, question)])

    def done(found: Results, *asked: list[Any]) -> list[int]:
        return sorted(found.done("trec", [found.fingerprint(q) for q in asked]))

    assert done(results(tmp_path / "a"), question) == [0] == done(results(tmp_path / "a"), ["p", 8, ["\n"]])
    for other in (["q", 8, ("\n",)], ["p", 9, ("\n",)], ["p", 8, ()], ["p", 8]):
        assert done(results(tmp_path / "a"), other) == []
    assert done(results(tmp_path / "a")) == [] and done(results(tmp_path / "a"), ["q"], question) == []
    # by its own word, whatever becomes of evaluation.json
    for change in ({"weights": ["b"]}, {"bos": 1}, {"ends": [2, 3]}, {"precision": "bf16"}):
        (tmp_path / "a/evaluation.json").unlink()
        assert done(results(tmp_path / "a", **change), question) == []


def test_a_folder_of_another_evaluation_is_refused(tmp_path: Path) -> None:
    results(tmp_path)
    with pytest.raises(ConfigError, match=r"--out .*: holds an evaluation whose ends is \[2\], not \[3\]; choose"):
        results(tmp_path, ends=[3])
    with pytest.raises(ConfigError, match=r"holds an evaluation of an earlier version, without model; choose"):
        results(tmp_path, model="m")
    (tmp_path / "evaluation.json").write_text(json.dumps(IDENTITY | {"new": 1}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"whose new is 1, not None; choose another folder"):
        results(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--out .*/file: cannot be written: .*; name another folder"):
        results(tmp_path / "file")


@pytest.mark.parametrize("content", [b"", b"\0" * 40, b'{"weights": ["a"', b"[]", b"\xff"])
def test_a_torn_evaluation_is_written_anew(tmp_path: Path, content: bytes) -> None:
    """Its answers count on: each says what it belongs to."""
    first = results(tmp_path)
    first.append("trec", [row(first, 0, ["p"])])
    (tmp_path / "evaluation.json").write_bytes(content)
    said: list[str] = []
    again = results(tmp_path, said)
    assert len(again.done("trec", [again.fingerprint(["p"])])) == 1
    line = "damaged; written anew, answers of other weights or settings are asked again"
    assert said == [f"{tmp_path}/evaluation.json: {line}"]
    assert json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8")) == IDENTITY


def test_damaged_lines_are_passed_over(tmp_path: Path) -> None:
    said: list[str] = []
    found = results(tmp_path, said)
    inputs = [found.fingerprint([i]) for i in range(4)]
    whole = [json.dumps(row(found, i, [i], f"é{i}")) for i in range(4)]
    held = {"place": 3, "input": inputs[3], "tokens": 2, "loss": 1.0, "correct": 1}
    bad = ["", "5", "[]", "null", "\0" * 100, whole[1][:-9], '{"place": 1}', whole[1].replace("prediction", "said"),
           whole[1].replace('"place": 1', '"place": "1"'), whole[1].replace('"place": 1', '"place": -1'), "[" * 9999,
           whole[1].replace('"place": 1', '"place": 9'), json.dumps(held | {"loss": None})]  # fmt: skip
    lines = [whole[0], *bad, whole[2], json.dumps(held)]
    (tmp_path / "trec.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n" + whole[1][:20].encode())
    done = found.done("trec", inputs)
    assert sorted(done) == [0, 2, 3] and done[2]["prediction"] == "é2" and done[3] == held
    assert said == [f"{tmp_path}/trec.jsonl: damaged lines passed over, their questions are asked again: 13"]
    found.start("trec", done.values())
    said.clear()
    assert sorted(found.done("trec", inputs)) == [0, 2, 3] and not said
    (tmp_path / "empty.jsonl").touch()
    assert found.done("empty", inputs) == found.done("none", inputs) == {} and not said


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    other = Results(tmp_path / "a", IDENTITY, writes=False)
    other.start("trec", [{"place": 0}])
    other.append("trec", [{"place": 0}])
    other.finish({}, "")
    assert not (tmp_path / "a").exists()


def test_predictions_of_a_run_are_scored_as_today() -> None:
    """Whatever score stands beside them."""
    rows = [{"task": "trec", "prediction": "City", "references": ["City"], "score": 0.0},
            {"task": "trec", "prediction": "Food", "references": ["City"], "score": 1.0},
            {"task": "qasper", "prediction": "a b", "references": ["b"], "score": 0.3}]  # fmt: skip
    assert score_table(rows).splitlines() == ["trec    50.0 ± 50.0  (n 2)", "qasper  100.0 ± 0.0  (n 1)"]


def held_out(tmp_path: Path, ntp_only: str) -> dict[str, Any]:
    """On a rank: metrics of held-out rows, and what the passes held of the layers when they were done."""
    from megatron_refine.data.packed import PackedRows
    from megatron_refine.data.packing import SIDES, RowRule, pack
    from megatron_refine.eval import heldout
    from megatron_refine.step.refine import RefineStep
    from megatron_refine.trainer import forward
    from megatron_refine.trainer.model import unwrap

    config = small_config(tmp_path, ntp_only, "eval.sequences=5")
    model, ranks = build(config, torch.float32)
    ids = [torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(length)).numpy()
           for length in (192, 180, 192, 100, 3)]  # fmt: skip
    if ranks.is_main:
        pack([("valid", row) for row in ids], tmp_path, dict.fromkeys(SIDES, RowRule(192, 2, False, None)), 97, "f")
    torch.distributed.barrier()
    rows = PackedRows(tmp_path / "valid", 97)
    step = RefineStep(config, model, None, None, ranks)  # type: ignore[arg-type]
    collected = []
    for layer in unwrap(model).decoder.layers:
        layer.register_forward_hook(
            lambda _, __, kwargs, ___: collected.append(kwargs["packed_seq_params"].handles), with_kwargs=True
        )  # fmt: skip
    metrics = heldout.HeldOut(step, rows, torch.device("cpu"))()
    sums = torch.zeros(5, dtype=torch.float64)
    for i in range(0, 5, 2):
        batch = rows.batch(range(i, min(i + 2, 5)), range(i, min(i + 2, 5)))
        with torch.no_grad():
            scores = forward.main_pass(model, batch.tokens).scores
        sums += heldout._sums(batch, scores.logprobs[:, :-1], scores.correct, scores.entropy)[:5]
    names = ("eval/ntp_loss", "eval/ntp_accuracy", "eval/sampled_accuracy", "eval/entropy")
    expected = dict(zip(names, (sums[:4] / sums[4]).tolist(), strict=True))
    return {"metrics": metrics, "expected": expected, "handles": collected[: len(collected) // 2]}


@pytest.mark.parametrize("ntp_only", ["refine.enabled=false", "eval.rollouts=false"])
def test_held_out_rows_are_scored_without_the_handles_of_the_layers(
    ntp_only: str, ranks: Any, tmp_path: Path
) -> None:  # fmt: skip
    """Bit by bit what a pass that keeps them gives."""
    found = ranks(1, held_out, timeout=60, tmp_path=tmp_path, ntp_only=ntp_only)[0]
    assert found["metrics"] == found["expected"] and found["metrics"]["eval/ntp_loss"] > 4
    assert found["handles"] and all(handles is None for handles in found["handles"])


def test_held_out_rows_count_once_where_replicas_have_unequal_numbers(ranks: Any, tmp_path: Path) -> None:
    """Two replicas with three and two of them, two a pass: in the second pass one replica has none of its own."""
    for found in ranks(2, held_out, tmp_path=tmp_path, ntp_only="eval.rollouts=false"):
        assert found["metrics"] == pytest.approx(found["expected"], rel=1e-6)
