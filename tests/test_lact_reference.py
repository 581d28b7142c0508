"""LaCT's slow evaluation against the original implementation, and its tensors all accounted for."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from megatron_refine.models.hf import REQUIRED, at_layer
from megatron_refine.models.lact.hf import FORMAT
from megatron_refine.models.lact.reference import logits
from tests.test_golden import GOLDEN, check

# Newton-Schulz turns the smallest singular values up to one: roundings of fp32 grow by some 30
TOLERANCES = {"lact": (2e-5, 1e-4), "lact_muon": (2e-4, 1e-3), "lact_muon_nope": (2e-4, 1e-3)}


def model_of(name: str) -> Any:
    """The fields of config.json under our names."""
    config = json.loads((GOLDEN / name / "config.json").read_text())
    fields = {key.ours: config.get(field, key.default) for field, key in FORMAT.fields.items()}
    assert REQUIRED not in fields.values()
    for field, allowed in FORMAT.constants.items():
        assert config.get(field, allowed[0]) in allowed, field
    known = {*FORMAT.fields, *FORMAT.constants, *FORMAT.ignored}
    assert config.keys() - known == {"model_type", "architectures", "hidden_ratio", "intermediate_size"}
    return SimpleNamespace(**fields, intermediate_size=config["intermediate_size"], padded_vocab=128)


@pytest.mark.parametrize("name", TOLERANCES)
def test_every_tensor_has_a_mapping(name: str) -> None:
    described = {}
    for mapping in FORMAT.tensors(model_of(name)):
        for layer in range(2) if "{}" in mapping.ours else [0]:
            described |= at_layer(mapping, layer).sources()
    assert described == {n: tuple(t.shape) for n, t in load_file(GOLDEN / name / "model.safetensors").items()}


@pytest.mark.parametrize("case", ["case0", "case1"])
@pytest.mark.parametrize("name", TOLERANCES)
def test_the_slow_evaluation_equals_the_original_implementation(name: str, case: str) -> None:
    """Through several chunks and windows, the last one not full."""
    tokens = load_file(GOLDEN / name / "expected.safetensors")[f"{case}.input_ids"]
    weights = {own: w.requires_grad_() for own, w in load_file(GOLDEN / name / "model.safetensors").items()}
    found = logits(model_of(name), weights, tokens)
    loss = F.cross_entropy(found[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
    check(name, found.detach(), loss.item(), gradients, case, TOLERANCES[name])
