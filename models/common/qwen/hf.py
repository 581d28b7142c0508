"""Qwen's hybrids in Hugging Face's format, as transformers 5.24 writes them: the fields that they share."""

from typing import Any

from megatron_refine.models.common import hybrid_hf as hybrid
from megatron_refine.models.common.hybrid import pattern
from megatron_refine.models.common.hybrid_hf import ROPE
from megatron_refine.models.hf import ABSENT, Key


def read(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of config.json, those of rope_parameters by names of their own, with the kinds of layers."""
    found = {name: value for name, value in tree.items() if name != ROPE}
    found |= {f"{ROPE}.{name}": value for name, value in (tree.get(ROPE) or {}).items()}
    if not found.get("layer_types"):
        every, count = found.get("full_attention_interval") or 4, found.get("num_hidden_layers") or 0
        found["layer_types"] = pattern(count, every)
    return found


def write(fields: dict[str, Any]) -> dict[str, Any]:
    """Return config.json: the inverse of `read`."""
    fields = hybrid.named(fields)
    nested = {name.removeprefix(f"{ROPE}."): value for name, value in fields.items() if name.startswith(f"{ROPE}.")}
    return {name: value for name, value in fields.items() if not name.startswith(f"{ROPE}.")} | {ROPE: nested}


FIELDS = hybrid.FIELDS | {
    "head_dim": Key("head_dim", 256),
    "linear_num_key_heads": Key("linear_num_key_heads", 16),
    "linear_num_value_heads": Key("linear_num_value_heads", 32),
    "linear_key_head_dim": Key("linear_key_head_dim", 128),
    "linear_value_head_dim": Key("linear_value_head_dim", 128),
    f"{ROPE}.rope_theta": Key("rope_theta", 10000.0),
    f"{ROPE}.partial_rotary_factor": Key("partial_rotary_factor", 0.25),
}
# said again elsewhere
IGNORED = hybrid.IGNORED | {"full_attention_interval": ABSENT, "partial_rotary_factor": ABSENT}
