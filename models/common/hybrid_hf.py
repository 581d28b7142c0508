"""Hybrids in Hugging Face's format, as transformers 5.24 writes them: what their families share."""

from typing import Any

from megatron_refine.models import hf
from megatron_refine.models.common.hybrid import pattern
from megatron_refine.models.hf import Key, Mapping

ROPE = "rope_parameters"
FIELDS = {"rms_norm_eps" if name == "norm_eps" else name: key for name, key in hf.FIELDS.items()} | {
    "num_attention_heads": Key("num_attention_heads"),
    "num_key_value_heads": Key("num_key_value_heads"),
    "linear_num_key_heads": Key("linear_num_key_heads"),
    "linear_num_value_heads": Key("linear_num_value_heads"),
    "linear_key_head_dim": Key("linear_key_head_dim"),
    "linear_value_head_dim": Key("linear_value_head_dim"),
    "linear_conv_kernel_dim": Key("linear_conv_kernel_dim", 4),
    "layer_types": Key("layer_types"),
}
CONSTANTS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    f"{ROPE}.rope_type": ("default",),
    "quantization_config": (None,),
}
IGNORED: dict[str, Any] = {name: value for name, value in hf.IGNORED.items() if not name.startswith("fuse_")}


def around(model: Any) -> tuple[Mapping, ...]:
    """The tensors around the layers."""
    return hf.frame(model, "model.embed_tokens.weight")


def named(fields: dict[str, Any]) -> dict[str, Any]:
    """Name the kind of each layer, which transformers wants, where the model leaves that to the pattern."""
    return fields | {"layer_types": fields["layer_types"] or pattern(fields["num_hidden_layers"])}
