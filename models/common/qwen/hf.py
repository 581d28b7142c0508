"""Qwen's hybrids in Hugging Face's format, as transformers 5.24 writes them: the fields that they share."""

from typing import Any

from megatron_refine.models import hf
from megatron_refine.models.common.hybrid import pattern
from megatron_refine.models.hf import ABSENT, Key, Mapping

ROPE = "rope_parameters"


def read(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of config.json, those of rope_parameters by names of their own, with the kinds of layers."""
    found = {name: value for name, value in tree.items() if name != ROPE}
    found |= {f"{ROPE}.{name}": value for name, value in (tree.get(ROPE) or {}).items()}
    if not found.get("layer_types"):
        every, count = found.get("full_attention_interval") or 4, found.get("num_hidden_layers") or 0
        found["layer_types"] = pattern(count, every)
    return found


def write(fields: dict[str, Any]) -> dict[str, Any]:
    """Return config.json: the inverse of `read`. Kinds of layers are always named: transformers wants one a layer."""
    fields = fields | {"layer_types": fields["layer_types"] or pattern(fields["num_hidden_layers"])}
    nested = {name.removeprefix(f"{ROPE}."): value for name, value in fields.items() if name.startswith(f"{ROPE}.")}
    return {name: value for name, value in fields.items() if not name.startswith(f"{ROPE}.")} | {ROPE: nested}


def around(model: Any) -> tuple[Mapping, ...]:
    """The tensors around the layers."""
    return hf.frame(model, "model.embed_tokens.weight")


FIELDS = {
    "vocab_size": Key("vocab_size"),
    "hidden_size": Key("hidden_size"),
    "num_hidden_layers": Key("num_layers"),
    "rms_norm_eps": Key("norm_eps", 1e-6),
    "initializer_range": Key("init_std", 0.02),
    "tie_word_embeddings": Key("tie_embeddings", False),
    "num_attention_heads": Key("num_attention_heads"),
    "num_key_value_heads": Key("num_key_value_heads"),
    "head_dim": Key("head_dim", 256),
    "linear_num_key_heads": Key("linear_num_key_heads", 16),
    "linear_num_value_heads": Key("linear_num_value_heads", 32),
    "linear_key_head_dim": Key("linear_key_head_dim", 128),
    "linear_value_head_dim": Key("linear_value_head_dim", 128),
    "linear_conv_kernel_dim": Key("linear_conv_kernel_dim", 4),
    "layer_types": Key("layer_types"),
    f"{ROPE}.rope_theta": Key("rope_theta", 10000.0),
    f"{ROPE}.partial_rotary_factor": Key("partial_rotary_factor", 0.25),
}
CONSTANTS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    f"{ROPE}.rope_type": ("default",),
    "quantization_config": (None,),
}
IGNORED: dict[str, Any] = {name: value for name, value in hf.IGNORED.items() if not name.startswith("fuse_")} | {
    "full_attention_interval": ABSENT,
    "partial_rotary_factor": ABSENT,
}  # said again elsewhere
