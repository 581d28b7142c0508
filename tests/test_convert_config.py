"""config.json: every field is honoured or refused by name; what is written for a model trained here."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_refine.config import ConfigError
from megatron_refine.convert.fields import fresh_config, model_of
from megatron_refine.convert.hf_writer import size_in_bytes
from megatron_refine.convert.mapping import Converter
from megatron_refine.models import cost
from tests.conversions import GOLDEN
from tests.test_golden import FOLDERS, golden_model

DELTA_NET_1_3B: dict[str, Any] = {  # as released
    "architectures": ["DeltaNetForCausalLM"], "model_type": "delta_net", "attn": None, "attn_mode": "chunk",
    "hidden_size": 2048, "num_hidden_layers": 24, "num_heads": 16, "expand_k": 1, "expand_v": 1, "conv_size": 4,
    "qk_activation": "silu", "qk_norm": "l2", "use_beta": True, "use_gate": False, "use_output_norm": True,
    "use_short_conv": True, "hidden_ratio": 4, "intermediate_size": None, "hidden_act": "swish", "norm_eps": 1e-6,
    "norm_first": False, "max_position_embeddings": 2048, "vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 2, "tie_word_embeddings": False, "initializer_range": 0.02, "torch_dtype": "bfloat16",
    "fuse_cross_entropy": True, "fuse_norm": True, "use_cache": True, "transformers_version": "4.48.2",
}  # fmt: skip


def test_the_released_1_3b_model() -> None:
    model = model_of(DELTA_NET_1_3B, "config.json")
    assert model.intermediate_size == 5632  # int(2048 * 4 * 2 / 3) = 5461, to a multiple of 256
    assert cost.parameters(model) == 1_365_677_056  # 2.73 GB in bf16, as on the hub
    converter = Converter(model)
    assert len(converter.hf_shapes) == 339
    assert sum(torch.Size(s).numel() for s in converter.hf_shapes.values()) == 1_365_677_056


@pytest.mark.parametrize("name", FOLDERS)
def test_a_config_written_here_is_read_as_the_same_model(name: str) -> None:
    model = golden_model(name)
    written = fresh_config(model, "float32")
    assert model_of(written, "config.json") == model
    original = json.loads((GOLDEN / name / "config.json").read_text(encoding="utf-8"))
    unlike = {k: (v, original.get(k)) for k, v in written.items() if original.get(k) != v}
    told_elsewhere = {"bos_token_id", "eos_token_id", "fuse_cross_entropy", "max_position_embeddings", "torch_dtype"}
    told_elsewhere |= {"num_experts"}  # which no layer has
    assert not unlike.keys() - told_elsewhere, unlike


FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown field": ({"use_rope": True}, r"use_rope=True: unknown field, which may change the model; remove it if"),
    "short convolution": (
        {"use_short_conv": False},
        r"use_short_conv=False: not available; .* use_short_conv=True only",
    ),
    "gate": ({"use_gate": True}, r"use_gate=True: not available"),
    "beta": ({"use_beta": False}, r"use_beta=False: not available"),
    "norm of q and k": ({"qk_norm": "sum"}, r"qk_norm='sum': not available; .* qk_norm='l2' only"),
    "hybrid layers": ({"attn": {"layers": [1]}}, r"attn=\{'layers': \[1\]\}: not available"),
    "activation": ({"hidden_act": "gelu"}, r"hidden_act='gelu': not available; .*'swish' or 'silu' only"),
    "a number for true": ({"use_beta": 1}, r"use_beta=1: not available"),
    "family": ({"model_type": "llama"}, r"model_type='llama': no such family; there are .*delta_net \(delta_net\)"),
    "type": ({"num_heads": "16"}, r"num_heads='16': Input should be a valid integer"),
    "heads": ({"num_heads": 7}, r"expand_k=1\.0: .*is the width of a head and must be a whole number"),
    "width": ({"intermediate_size": None, "hidden_ratio": None}, r"intermediate_size=None: needs a hidden_ratio above"),
    "quantized": ({"quantization_config": {"bits": 4}}, r"quantization_config=.*: not available"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_a_field_that_is_not_honoured_is_refused_by_name(case: str) -> None:
    fields, pattern = FIELDS[case]
    config = json.loads((GOLDEN / "delta_net" / "config.json").read_text(encoding="utf-8")) | fields
    with pytest.raises(ConfigError) as error:
        model_of(config, "there/config.json")
    assert re.search(f"^there/config.json: {pattern}", str(error.value)), str(error.value)


def test_a_field_that_is_missing() -> None:
    config = json.loads((GOLDEN / "delta_net" / "config.json").read_text(encoding="utf-8"))
    del config["num_heads"]
    with pytest.raises(ConfigError, match=r"^config\.json: num_heads: missing; it says the model's num_heads$"):
        model_of(config, "config.json")


@pytest.mark.parametrize("text, size", [("5GB", 5 * 10**9), ("1 mib", 2**20), ("500KB", 500_000), ("123", 123)])
def test_sizes(text: str, size: int) -> None:
    assert size_in_bytes(text) == size
    with pytest.raises(ConfigError):
        size_in_bytes("0GB")


def test_a_model_of_several_dtypes_declares_the_widest(tmp_path: Path) -> None:
    """Else whoever loads it rounds what is wider."""
    from megatron_refine.checkpoint.conversion import _write_config

    for start in ({}, {"dtype": "float16"}):
        if start:
            (tmp_path / "config.json").write_text(json.dumps(start), encoding="utf-8")
        _write_config(tmp_path, golden_model("delta_net"), {torch.bfloat16, torch.float32})
        found = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
        assert [found.get(key) for key in ("dtype", "torch_dtype") if key in found] == ["float32"]
