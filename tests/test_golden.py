"""Logits, loss and every gradient against the original implementations, from weights in the released format.

How the files were made is in tests/golden/README.md.
"""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from megatron_refine.config import Config, Data, Parallel, Train
from megatron_refine.convert.fields import model_of
from megatron_refine.convert.mapping import Converter
from megatron_refine.convert.source import HFSource
from megatron_refine.models import family
from tests.lanes import short
from tests.zygote import Zygote

GOLDEN = Path(__file__).parent / "golden"
# largest error of logits and of gradients, relative to the largest. fp32 rounds at 6e-8; the two implementations add in
# another order, through two layers, and gradients are sums of terms of either sign. Newton-Schulz (Muon) turns small
# singular values up to one: it multiplies the rounding of their directions by some tens
EXACT, MUON = (2e-5, 1e-4), (2e-4, 1e-3)
FOLDERS = {
    "delta_net": EXACT, "gated_delta_net": EXACT, "lact": EXACT, "lact_muon": MUON, "lact_muon_nope": MUON,
    "qwen3_5": EXACT, "olmo_hybrid": EXACT, "qwen3_next": EXACT,
}  # fmt: skip
TWO = ("lact", "lact_muon", "lact_muon_nope", "qwen3_5", "olmo_hybrid")
CASES = [(name, case) for name in FOLDERS for case in (["case0", "case1"] if name in TWO else ["case0"])]
VOCAB = 97
PADDED_ROWS = ("embedding.word_embeddings.weight", "output_layer.weight")
LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {  # parallel.*, train.recompute
    "tp1": ({}, "none"),
    "tp2": ({"tp": 2}, "none"),
    "tp2-sp": ({"tp": 2, "sp": True}, "none"),
    "tp2-sp-recompute": ({"tp": 2, "sp": True}, "full"),
    "cp2": ({"cp": 2}, "none"),
    "tp2-sp-pp2": ({"tp": 2, "sp": True, "pp": 2}, "none"),
}
FEW = ("tp1", "tp2-sp")  # of a family that has the layers of another


def golden_model(name: str) -> Any:
    return model_of(json.loads((GOLDEN / name / "config.json").read_text(encoding="utf-8")), name)


def golden_config(name: str, layout: str) -> Config:
    """The released config.json as ours."""
    parallel, recompute = LAYOUTS[layout]
    train = Train(precision="fp32", global_batch_size=2, micro_batch_size=2, recompute=recompute)  # type: ignore[arg-type]
    return Config(model=golden_model(name), parallel=Parallel(**parallel), train=train, data=Data(seq_length=100))


def compute(name: str, case: str, layout: str) -> dict[str, Any]:
    """On a rank: what the Megatron model makes of the golden weights and tokens."""
    from megatron_refine.trainer import parity
    from megatron_refine.trainer.model import build_model, global_parameters
    from megatron_refine.trainer.parallel import init_parallel

    config = golden_config(name, layout)
    ranks, source = init_parallel(config), HFSource(GOLDEN / name)
    model = build_model(config, ranks)
    parity.load(model, source, ranks)
    tokens = load_file(GOLDEN / name / "expected.safetensors")[f"{case}.input_ids"]
    logits, loss, gradients = parity.evaluate(model, tokens, ranks)
    here = {own for own, _ in global_parameters(model)}
    return {"logits": logits, "loss": loss, "gradients": gradients, "here": here}


def check(name: str, case: str, logits: torch.Tensor, loss: float, gradients: dict[str, torch.Tensor]) -> None:
    """Against what the original computed."""
    expected = load_file(GOLDEN / name / "expected.safetensors")
    truth, (of_logits, of_gradients) = expected[f"{case}.logits"], FOLDERS[name]
    assert (logits[..., :VOCAB] - truth).abs().max() <= of_logits * max(1.0, float(truth.abs().max()))
    assert loss == pytest.approx(float(expected[f"{case}.loss"]), rel=1e-6)  # a mean
    assert {f"{case}.grad.{own}" for own in gradients} == {key for key in expected if key.startswith(f"{case}.grad.")}
    for own, gradient in gradients.items():
        theirs = expected[f"{case}.grad.{own}"]
        assert (gradient - theirs).norm() <= of_gradients * theirs.norm(), own


@pytest.mark.parametrize("name, case", CASES)
def test_the_slow_evaluation_equals_the_original_implementation(name: str, case: str) -> None:
    """models/<family>/reference.py: what conversions are verified with."""
    model, tokens = golden_model(name), load_file(GOLDEN / name / "expected.safetensors")[f"{case}.input_ids"]
    weights = {own: w.requires_grad_() for own, w in load_file(GOLDEN / name / "model.safetensors").items()}
    logits = family.reference(model)(model, weights, tokens)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    gradients = torch.autograd.grad(loss, list(weights.values()))
    check(name, case, logits.detach(), loss.item(), dict(zip(weights, gradients, strict=True)))


@pytest.mark.parametrize(
    ("name", "case", "layout"),
    short(
        [(name, case, layout) for name, case in CASES for layout in LAYOUTS if name != "qwen3_next" or layout in FEW],
        lambda name, case, layout: layout in ("tp1", "tp2-sp-pp2") or name == "delta_net",
    ),
)
def test_equals_the_original_implementation(name: str, case: str, layout: str, ranks: Zygote) -> None:
    config = golden_config(name, layout)
    converter = Converter(config.model)
    everywhere = ranks(config.parallel.model_size, compute, name=name, case=case, layout=layout)
    here = set().union(*(found["here"] for found in everywhere))
    assert here == set(converter.megatron_shapes), "a weight without a parameter, or the other way round"
    for found in everywhere:
        assert (found["logits"][..., VOCAB:] < -1e30).all()  # ids of the padding can never be drawn
        for own in PADDED_ROWS:
            assert not found["gradients"][own][VOCAB:].any()
        full = found["gradients"].items()
        gradients = {theirs: part for own, grad in full for theirs, part in converter.to_hf(own, grad)}
        check(name, case, found["logits"], found["loss"], gradients)


def run_tool(*arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "tools/parity.py", *arguments],
        cwd=GOLDEN.parents[1],
        capture_output=True,
        encoding="utf-8",
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_the_command_line_compares_on_its_own_ranks(tmp_path: Path) -> None:
    code, out, err = run_tool(str(GOLDEN / "lact"), "--tp", "2", "--sp")
    assert code == 0, err
    assert [line.split()[:2] for line in out.splitlines()] == [["case0:", "ok"], ["case1:", "ok"]]
    assert "gradients" in out and "worst model." in out
    shutil.copytree(GOLDEN / "delta_net", tmp_path / "wrong")
    weights = load_file(tmp_path / "wrong" / "model.safetensors")
    weights["model.layers.1.attn.b_proj.weight"] *= 1.01
    save_file(weights, tmp_path / "wrong" / "model.safetensors")
    code, out, _ = run_tool(str(tmp_path / "wrong"))
    assert code == 1 and "DIFFERENT" in out


@pytest.mark.slow
def test_the_command_line_names_damaged_files(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "delta_net", tmp_path / "cut")
    (tmp_path / "cut" / "expected.safetensors").unlink()
    code, out, err = run_tool(str(tmp_path / "cut"))
    assert code == 4 and not out and "expected.safetensors: cannot be read" in err


@pytest.mark.parametrize(
    ("folder", "arguments", "code", "says"),
    [
        ("lact_muon_nope", ["--tp", "4"], 2, "parallel.tp=4: must divide the 2 heads of the model; choose one of 1, 2"),
        ("lact_muon_nope", ["--tp", "2", "--cp", "2"], 2, "parallel.cp=2: tp*cp = 4 must divide the 2 heads"),
        ("delta_net", ["--sp"], 2, "parallel.sp=true: sequence parallelism needs parallel.tp > 1"),
        ("delta_net", ["--pp", "3"], 2, "parallel.pp=3: must divide model.num_layers=2"),
        ("delta_net", ["--tp", "0"], 2, "--tp 0: must be 1 or more"),
        ("nowhere", [], 2, "no such folder"),
        ("mistral_v1", [], 2, "config.json: cannot be read: No such file or directory"),
    ],
)
def test_the_command_line_refuses(folder: str, arguments: list[str], code: int, says: str) -> None:
    found, out, err = run_tool(str(GOLDEN / folder), *arguments)
    assert found == code and says in err and len(err.splitlines()) == 1 and not out


@pytest.mark.parametrize("wrong", ["logits", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_does_not_agree(wrong: str, value: float) -> None:
    from megatron_refine.trainer.parity import Errors

    right = Errors(logits=0.5, logit_limit=1.0, loss=0.0, gradient=0.5, gradient_limit=1.0, worst="x")
    assert right.passed and not dataclasses.replace(right, **{wrong: value}).passed
