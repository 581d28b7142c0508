"""Olmo-Hybrid in Hugging Face's format, as its released checkpoints are written."""

from typing import Any

from megatron_refine.models.common import hybrid_hf as hybrid
from megatron_refine.models.common.hybrid import pattern
from megatron_refine.models.hf import ABSENT, Format, Key

OURS, THEIRS = "decoder.layers.{}.self_attention.", "model.layers.{}.linear_attn."
NORMS = {  # of a layer's mixer and MLP: before them in linear layers, behind them in attention layers
    "linear_attention": ("attention_layer_norm", "feedforward_layer_norm"),
    "full_attention": ("post_attention_layernorm", "post_feedforward_layernorm"),
}
THETA = 10000.0  # what the class takes where config.json names none


def read(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with `rope_theta`, null where there are no positions, and the kinds of layers."""
    found = {name: value for name, value in tree.items() if name not in ("rope_parameters", "rope_theta")}
    rope = tree.get("rope_parameters")
    if isinstance(rope, dict):
        found |= {f"rope_parameters.{name}": value for name, value in rope.items() if name != "rope_theta"}
        found["rope_theta"] = rope.get("rope_theta")
    else:
        found["rope_theta"] = tree.get("rope_theta", THETA)
    heads, count = tree.get("num_attention_heads"), tree.get("num_hidden_layers") or 0
    for name in ("num_key_value_heads", "linear_num_key_heads", "linear_num_value_heads"):
        if found.get(name) is None:
            found[name] = heads
    keys, hidden = found["linear_num_key_heads"], tree.get("hidden_size")
    if found.get("linear_key_head_dim") is None and keys and hidden:
        found["linear_key_head_dim"] = int(0.75 * hidden / keys)
    if found.get("linear_value_head_dim") is None and found.get("linear_key_head_dim"):
        found["linear_value_head_dim"] = 2 * found["linear_key_head_dim"]
    if not found.get("layer_types"):
        kinds = pattern(count)
        found["layer_types"] = kinds if "full_attention" in kinds else [*kinds[:-1], "full_attention"]
    return found


def write(fields: dict[str, Any]) -> dict[str, Any]:
    """Return config.json: the inverse of `read`."""
    theta = fields["rope_theta"]
    fields = hybrid.named(fields)
    found = {name: value for name, value in fields.items() if not name.startswith("rope_")}
    if theta is None:
        return found | {"rope_parameters": None, "rope_theta": None}
    return found | {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


FORMAT = Format(
    model_type="olmo_hybrid",
    architecture="OlmoHybridForCausalLM",
    library="transformers",
    fields=hybrid.FIELDS | {
        "rope_theta": Key("rope_theta", THETA, null=0.0),
        "linear_allow_neg_eigval": Key("linear_allow_neg_eigval", True),
    },
    constants=hybrid.CONSTANTS,
    ignored=hybrid.IGNORED | dict.fromkeys(  # initialisation
        ("linear_a_log_min", "linear_a_log_max", "linear_dt_min", "linear_dt_max", "linear_dt_init_floor"), ABSENT
    ),
    frame=hybrid.around,
    read=read,
    write=write,
)  # fmt: skip
