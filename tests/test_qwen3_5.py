"""Qwen3.5 in the forms that it is released in: the text model alone, and beside vision and a predictor of tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_refine.config import ConfigError, load
from megatron_refine.convert.fields import fresh_config, model_of
from megatron_refine.models import cost, family
from tests.conversions import GOLDEN, convert, hf_folder, to_hf, to_megatron
from tests.parity import small_config
from tests.zygote import Zygote

RELEASED = {"0.8b": 0.752, "2b": 1.882, "4b": 4.206, "9b": 8.954, "27b": 26.90}  # 1e9 parameters of the text model
AROUND = {"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"], "image_token_id": 7}


def multimodal(path: Path, tied: bool) -> dict[str, Tensor]:
    """Write the golden checkpoint as a released one, with tensors beside the text model's; all that is in it."""
    hf_folder(path, "qwen3_5")
    config = json.loads((path / "config.json").read_text(encoding="utf-8")) | {"tie_word_embeddings": tied}
    tree = AROUND | {"text_config": config, "vision_config": {"depth": 2}, "tie_word_embeddings": tied}
    (path / "config.json").write_text(json.dumps(tree), encoding="utf-8")
    text = load_file(path / "model.safetensors")
    if tied:
        del text["lm_head.weight"]
    tensors = {name.replace("model.", "model.language_model.", 1): value for name, value in text.items()}
    for name, shape in {"model.visual.patch.weight": (4, 3), "mtp.layers.0.mlp.up_proj.weight": (2, 5)}.items():
        tensors[name] = torch.randn(shape)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return tensors


def files(path: Path) -> tuple[dict[str, Tensor], Any]:
    return load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("form", ["text", "multimodal", "multimodal, tied"])
def test_a_checkpoint_comes_back_bit_by_bit(ranks: Zygote, tmp_path: Path, form: str) -> None:
    """With all that the text model does not read, under the names that it came with."""
    hf, megatron, back = (tmp_path / name for name in ("hf", "megatron", "back"))
    if form == "text":
        hf_folder(hf, "qwen3_5")
    else:
        multimodal(hf, tied=form.endswith("tied"))
    for line in (to_megatron(hf, megatron, "--verify"), to_hf(megatron, back, "--verify")):
        end = ranks(1, convert, arguments=line)[0]
        assert end.code == 0, end.err
    (before, config), (after, found) = files(hf), files(back)
    assert found == config and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_config_json_is_read_whole() -> None:
    tree = json.loads((GOLDEN / "qwen3_5/config.json").read_text(encoding="utf-8"))
    model = model_of(tree, "config.json")
    assert model == model_of(AROUND | {"text_config": tree, "vision_config": {}}, "config.json")
    again = fresh_config(model, "float32")
    assert model_of(again, "config.json") == model and again["rope_parameters"]["partial_rotary_factor"] == 0.25
    without = {key: value for key, value in tree.items() if key != "layer_types"}
    assert model_of(without | {"full_attention_interval": 2}, "x").kinds == ["linear_attention", "full_attention"] * 2
    for wrong, words in (
        ({"attn_output_gate": False}, "attn_output_gate=False: not available"),
        ({"rope_parameters": tree["rope_parameters"] | {"rope_type": "yarn"}}, "rope_parameters.rope_type='yarn'"),
        ({"rope_parameters": tree["rope_parameters"] | {"factor": 4.0}}, "rope_parameters.factor=4.0: unknown field"),
        ({"num_experts": 8}, "num_experts=8: unknown field"),
        ({"layer_types": ["full_attention"]}, "names 1 layers, model.num_layers=4"),
    ):
        with pytest.raises(ConfigError, match=words):
            model_of(tree | wrong, "config.json")


@pytest.mark.parametrize("preset", ["qwen3_5_tiny", "qwen3_next_tiny", "olmo_hybrid_tiny"])
def test_an_export_names_the_kind_of_each_layer(preset: str) -> None:
    """transformers refuses a config.json that does not, and a preset need not."""
    model = load(["configs/bench.yaml"], [f"model={preset}"], family.FAMILIES).model
    tree = fresh_config(model, "float32")
    assert not model.layer_types and tree["layer_types"] == ["linear_attention"] * 3 + ["full_attention"]
    assert model_of(tree, "config.json").kinds == model.kinds


@pytest.mark.parametrize("size", RELEASED)
def test_presets_have_the_released_sizes(size: str) -> None:
    config = load(["configs/bench.yaml"], [f"model=qwen3_5_{size}"], family.FAMILIES)
    assert cost.parameters(config.model) == pytest.approx(1e9 * RELEASED[size], rel=1e-3)
    kinds = [layer.cost.kernels for layer in family.layers(config.model)]
    assert kinds == (["delta_rule"] * 3 + ["softmax_attention"]) * (config.model.num_layers // 4)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel.tp=8"], "parallel.tp=8"),
        (["model.num_key_value_heads=3"], "must divide model.num_attention_heads=4"),
        (["model.linear_num_value_heads=6"], "must be a multiple of model.linear_num_key_heads=4"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        small_config(tmp_path, *overrides, model="qwen3_5")
