"""Gated DeltaNet in Hugging Face's format, as flash-linear-attention writes it."""

from megatron_refine.models.gated_delta_net.config import GatedDeltaNetConfig
from megatron_refine.models.hf import ABSENT, CONSTANTS, FIELDS, IGNORED, Format, Heads, Key, Mapping, Same, frame


def mixer_tensors(model: GatedDeltaNetConfig) -> list[Mapping]:
    """List those of a layer's mixer. Ours are head-major by key head, with the rows of the value heads it has."""
    hidden, heads, k, v = model.hidden_size, model.num_heads, model.head_dim, model.head_dim_v
    ours, theirs = "decoder.layers.{}.self_attention.", "model.layers.{}.attn."
    group = model.value_heads // heads
    widths = {"q": k, "k": k, "v": group * v}
    rows = widths | ({"g": group * v} if model.use_gate else {}) | {"a": group, "b": group}
    projections = tuple((f"{theirs}{part}_proj.weight", count) for part, count in rows.items())
    convolutions = tuple((f"{theirs}{part}_conv1d.weight", count) for part, count in widths.items())
    return [
        Heads(ours + "in_proj.weight", projections, heads, (hidden,)),
        Heads(ours + "conv", convolutions, heads, (1, model.conv_size)),
        Same(ours + "A_log", theirs + "A_log", (model.value_heads,)),
        Same(ours + "dt_bias", theirs + "dt_bias", (model.value_heads,)),
        Same(ours + "o_norm.weight", theirs + "o_norm.weight", (v,)),
        Same(ours + "out_proj.weight", theirs + "o_proj.weight", (hidden, model.value_heads * v)),
    ]


FORMAT = Format(
    model_type="gated_deltanet",
    architecture="GatedDeltaNetForCausalLM",
    fields=FIELDS
    | {
        "num_heads": Key("num_heads"),
        "head_dim": Key("head_dim"),
        "expand_v": Key("expand_v", 2.0),
        "num_v_heads": Key("num_v_heads", None, null=0),
        "use_gate": Key("use_gate", True),
        "conv_size": Key("conv_size", 4),
        "allow_neg_eigval": Key("allow_neg_eigval", False),
    },
    constants=CONSTANTS
    | {
        "use_short_conv": (True,),
        "output_gate_activation": ("swish", "silu"),
        "attn": (None,),
        "attnres_block_size": (None,),
        # of early versions
        "use_mamba_gate": (True,),
        "use_residual": (False,),
        "expand_k": (0.75, 1.0, 1),  # read by no code: head_dim says it
    },
    ignored=IGNORED | {"norm_first": ABSENT},
    frame=frame,
    not_written=("quantization_config", "use_mamba_gate", "use_residual", "expand_k"),
    unused=("model.layers.{}.attn.D",),
)
