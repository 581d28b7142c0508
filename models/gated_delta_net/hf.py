"""Gated DeltaNet in Hugging Face's format, as flash-linear-attention writes it."""

from megatron_refine.models.hf import ABSENT, CONSTANTS, FIELDS, IGNORED, Format, Key, frame

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
