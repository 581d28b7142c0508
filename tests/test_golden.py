"""Logits, loss and every gradient against the original implementations, from weights in the released format.

How the files were made is in tests/golden/README.md.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file

from megatron_refine.config import Config, Data, Parallel, Train
from megatron_refine.convert.fields import model_of
from megatron_refine.convert.mapping import Converter
from megatron_refine.models import family
from tests.parity import full_gradients
from tests.zygote import Zygote

GOLDEN = Path(__file__).parent / "golden"
# largest error of logits and of gradients, relative to the largest. fp32 rounds at 6e-8; the two implementations add in
# another order, through two layers, and gradients are sums of terms of either sign. Newton-Schulz (Muon) turns small
# singular values up to one: it multiplies the rounding of their directions by some tens
EXACT, MUON = (2e-5, 1e-4), (2e-4, 1e-3)
FOLDERS = {
    "delta_net": EXACT, "gated_delta_net": EXACT, "lact": EXACT, "lact_muon": MUON, "lact_muon_nope": MUON
}  # fmt: skip
CASES = [(name, case) for name in FOLDERS for case in (["case0", "case1"] if "lact" in name else ["case0"])]
VOCAB = 97
PADDED_ROWS = ("embedding.word_embeddings.weight", "output_layer.weight")
LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {  # parallel.*, train.recompute
    "tp1": ({}, "none"),
    "tp2": ({"tp": 2}, "none"),
    "tp2-sp": ({"tp": 2, "sp": True}, "none"),
    "tp2-sp-recompute": ({"tp": 2, "sp": True}, "full"),
}


def golden_model(name: str) -> Any:
    return model_of(json.loads((GOLDEN / name / "config.json").read_text()), name)


def golden_config(name: str, layout: str) -> Config:
    """The released config.json as ours."""
    parallel, recompute = LAYOUTS[layout]
    train = Train(precision="fp32", global_batch_size=2, micro_batch_size=2, recompute=recompute)  # type: ignore[arg-type]
    return Config(model=golden_model(name), parallel=Parallel(**parallel), train=train, data=Data(seq_length=100))


def compute(name: str, case: str, layout: str) -> dict[str, Any]:
    """On a rank: what the Megatron model makes of the golden weights and tokens; gathered over tp."""
    from megatron_refine.trainer.forward import main_pass
    from megatron_refine.trainer.gradients import finalize_gradients
    from megatron_refine.trainer.model import build_model, global_parameters, unwrap
    from megatron_refine.trainer.parallel import init_parallel
    from megatron_refine.trainer.shards import full_shape, shard

    config = golden_config(name, layout)
    ranks = init_parallel(config)
    model = build_model(config, ranks)
    converter, hf = Converter(config.model), load_file(GOLDEN / name / "model.safetensors")
    left = dict(converter.megatron_shapes)
    with torch.no_grad():
        for own, parameter in global_parameters(model):
            assert left.pop(own) == full_shape(parameter, ranks.tp), own
            parameter.copy_(shard(converter.to_megatron(own, hf), parameter, ranks.tp_rank, ranks.tp))
    tokens = load_file(GOLDEN / name / "expected.safetensors")[f"{case}.input_ids"]
    done = main_pass(model, tokens)
    local = unwrap(model).logits(done.rows.detach().flatten(0, 1)).detach()
    parts = [torch.empty_like(local) for _ in range(ranks.tp)]
    dist.all_gather(parts, local, group=ranks.tp_group)
    loss = -done.scores.logprobs[:, :-1].mean()
    model.zero_grad_buffer()
    loss.backward()
    finalize_gradients([model])
    logits = torch.cat(parts, 1).unflatten(0, tokens.T.shape).transpose(0, 1)
    return {"logits": logits, "loss": loss.detach(), "gradients": full_gradients(model), "left": sorted(left)}


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
    logits = family.reference(model.family).logits(model, weights, tokens)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    gradients = torch.autograd.grad(loss, list(weights.values()))
    check(name, case, logits.detach(), loss.item(), dict(zip(weights, gradients, strict=True)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name, case", CASES)
def test_equals_the_original_implementation(name: str, case: str, layout: str, ranks: Zygote) -> None:
    config = golden_config(name, layout)
    converter = Converter(config.model)
    for found in ranks(config.parallel.tp, compute, name=name, case=case, layout=layout):
        assert not found["left"], "weights without a parameter"
        assert (found["logits"][..., VOCAB:] < -1e30).all()  # ids of the padding can never be drawn
        for own in PADDED_ROWS:
            assert not found["gradients"][own][VOCAB:].any()
        full = found["gradients"].items()
        gradients = {theirs: part for own, grad in full for theirs, part in converter.to_hf(own, grad)}
        check(name, case, found["logits"], float(found["loss"]), gradients)
