"""Qwen3-Next without experts: what it has of its own beside Qwen3.5's layers."""

import json

import pytest

from megatron_refine.config import ConfigError
from megatron_refine.convert.fields import fresh_config, model_of
from megatron_refine.convert.mapping import Converter
from tests.conversions import GOLDEN

TREE = json.loads((GOLDEN / "qwen3_next/config.json").read_text(encoding="utf-8"))
DENSE = {
    "all layers named": {},
    "no experts": {"num_experts": 0, "mlp_only_layers": []},
    "a step beyond the last layer": {"decoder_sparse_step": 5, "mlp_only_layers": []},
    "the others named": {"decoder_sparse_step": 2, "mlp_only_layers": [1, 3]},
}
SPARSE = {
    "none named": {"mlp_only_layers": []},
    "one not named": {"mlp_only_layers": [0, 1, 3]},
    "every second": {"decoder_sparse_step": 2, "mlp_only_layers": [0, 1, 2]},
}


@pytest.mark.parametrize("changes", DENSE.values(), ids=DENSE)
def test_a_dense_model_is_read(changes: dict[str, object]) -> None:
    model = model_of(TREE | changes, "config.json")
    assert model == model_of(TREE, "config.json") and model.kinds == TREE["layer_types"]
    again = fresh_config(model, "float32")
    assert again["num_experts"] == 0 and model_of(again, "config.json") == model


@pytest.mark.parametrize("changes", SPARSE.values(), ids=SPARSE)
def test_experts_are_refused_by_name(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="num_experts=4: not available"):
        model_of(TREE | changes, "config.json")
    released = {name: value for name, value in (TREE | changes).items() if name != "num_experts"}
    with pytest.raises(ConfigError, match="num_experts=512: not available"):
        model_of(released, "config.json")


def test_a_heads_parts_lie_together() -> None:
    shapes = Converter(model_of(TREE, "config.json")).hf_shapes
    keys, values = 2 * 16, 4 * 16
    assert shapes["model.layers.0.linear_attn.in_proj_qkvz.weight"] == (2 * keys + 2 * values, 64)
    assert shapes["model.layers.0.linear_attn.in_proj_ba.weight"] == (2 * 4, 64)
