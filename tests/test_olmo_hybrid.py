"""Olmo-Hybrid in the form that it is released in, and the ways in which config.json says its positions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_refine.config import ConfigError, load
from megatron_refine.convert.fields import fresh_config, model_of
from megatron_refine.models import cost, family
from tests.conversions import GOLDEN, convert, hf_folder, to_hf, to_megatron
from tests.zygote import Zygote


def test_a_checkpoint_comes_back_bit_by_bit(ranks: Zygote, tmp_path: Path) -> None:
    hf, megatron, back = hf_folder(tmp_path / "hf", "olmo_hybrid"), tmp_path / "megatron", tmp_path / "back"
    for line in (to_megatron(hf, megatron, "--verify"), to_hf(megatron, back, "--verify")):
        end = ranks(1, convert, arguments=line)[0]
        assert end.code == 0, end.err
    before, after = (load_file(folder / "model.safetensors") for folder in (hf, back))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert (hf / "config.json").read_bytes() == (back / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("fields", "theta"),
    [
        ({"rope_parameters": {"rope_theta": None, "rope_type": "default"}}, 0.0),
        ({"rope_parameters": None, "rope_theta": None}, 0.0),
        ({"rope_parameters": {"rope_type": "default"}}, 0.0),
        ({"rope_parameters": None}, 10000.0),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5),
    ],
)
def test_positions_are_read_as_transformers_reads_them(fields: dict[str, Any], theta: float) -> None:
    tree = json.loads((GOLDEN / "olmo_hybrid/config.json").read_text(encoding="utf-8"))
    del tree["rope_theta"], tree["rope_parameters"]
    model: Any = model_of(tree | fields, "config.json")
    assert model.rope_theta == theta
    assert model_of(fresh_config(model, "float32"), "config.json") == model


def test_what_config_json_leaves_out_follows_from_the_rest() -> None:
    tree = json.loads((GOLDEN / "olmo_hybrid/config.json").read_text(encoding="utf-8"))
    left = ("num_key_value_heads", "layer_types", "linear_num_key_heads", "linear_num_value_heads",
            "linear_key_head_dim", "linear_value_head_dim")  # fmt: skip
    model: Any = model_of({name: value for name, value in tree.items() if name not in left}, "config.json")
    assert (model.num_key_value_heads, model.linear_num_key_heads, model.linear_num_value_heads) == (4, 4, 4)
    assert (model.linear_key_head_dim, model.linear_value_head_dim) == (12, 24)
    assert model.kinds == ["linear_attention"] * 3 + ["full_attention"]
    with pytest.raises(ConfigError, match="rope_parameters.rope_type='yarn': not available"):
        model_of(tree | {"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn"}}, "config.json")


def test_the_preset_has_the_released_size() -> None:
    config = load(["configs/bench.yaml"], ["model=olmo_hybrid_7b"], family.FAMILIES)
    assert cost.parameters(config.model) == pytest.approx(7.431e9, rel=1e-3)
    assert [layer.behind for layer in family.layers(config.model)] == [False, False, False, True] * 8
