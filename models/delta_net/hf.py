"""DeltaNet in Hugging Face's format, as flash-linear-attention writes it."""

from megatron_refine.models.delta_net.config import DeltaNetConfig
from megatron_refine.models.hf import ABSENT, CONSTANTS, FIELDS, IGNORED, Format, Heads, Key, Mapping, Same, frame


def mixer_tensors(model: DeltaNetConfig) -> list[Mapping]:
    """List those of a layer's mixer. Its projections are head-major in ours: [q | k | v | beta] a head."""
    hidden, heads, k, v = model.hidden_size, model.num_heads, model.head_dim_k, model.head_dim_v
    ours, theirs = "decoder.layers.{}.self_attention.", "model.layers.{}.attn."
    widths = {"q": k, "k": k, "v": v}
    projections = tuple((f"{theirs}{x}_proj.weight", rows) for x, rows in {**widths, "b": 1}.items())
    convolutions = tuple((f"{theirs}{x}_conv1d.weight", rows) for x, rows in widths.items())
    return [
        Heads(ours + "in_proj.weight", projections, heads, (hidden,)),
        Heads(ours + "conv", convolutions, heads, (1, model.conv_size)),
        Same(ours + "o_norm.weight", theirs + "o_norm.weight", (v,)),
        Same(ours + "out_proj.weight", theirs + "o_proj.weight", (hidden, heads * v)),
    ]


FORMAT = Format(
    model_type="delta_net",
    architecture="DeltaNetForCausalLM",
    fields=FIELDS
    | {
        "num_heads": Key("num_heads"),
        "expand_k": Key("expand_k", 1.0),
        "expand_v": Key("expand_v", 1.0),
        "conv_size": Key("conv_size", 4),
        "allow_neg_eigval": Key("allow_neg_eigval", False),
    },
    constants=CONSTANTS
    | {
        "use_short_conv": (True,),
        "use_beta": (True,),
        "use_gate": (False,),
        "use_output_norm": (True,),
        "qk_norm": ("l2",),
        "qk_activation": ("silu",),
        "attn": (None,),
        "attnres_block_size": (None,),
    },
    ignored=IGNORED | {"norm_first": ABSENT},  # of an early version, read by no code
    frame=frame,
    renamed={"model.layers.{}.attn.norm.weight": "model.layers.{}.attn.o_norm.weight"},
)
