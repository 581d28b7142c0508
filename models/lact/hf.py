"""LaCT in Hugging Face's format, as its authors' lact_llm writes it."""

from megatron_refine.models.hf import ABSENT, CONSTANTS, FIELDS, IGNORED, Format, Heads, Key, Mapping, Same, frame
from megatron_refine.models.lact.config import LactConfig

OURS, THEIRS = "decoder.layers.{}.self_attention.", "model.layers.{}.attn."


def mixer_tensors(model: LactConfig) -> list[Mapping]:
    """List those of a layer's mixer. Ours are head-major by fast-weight head: [q | k | v | lr | momentum | scale]."""
    hidden, heads, width = model.hidden_size, model.num_lact_heads, model.head_dim
    parts = [("lr_proj", 3)]
    parts += [("momentum_proj.0", 1)] if model.use_momentum else []
    parts += [("ttt_scale_proj", 1)] if model.learnable_ttt_scale else []
    qkv = [("qkv", width)] * 3
    weights = tuple((f"{THEIRS}{name}.weight", rows) for name, rows in [*qkv, *parts])
    biases = tuple((f"{THEIRS}{name}.bias", rows) for name, rows in [*(qkv if model.qkv_bias else []), *parts])
    return [
        Heads(OURS + "in_proj.weight", weights, heads, (hidden,)),
        Heads(OURS + "in_bias", biases, heads, ()),
        *_fast_weights(model),
        Same(OURS + "ttt_norm.weight", THEIRS + "ttt_norm.weight", (width,)),
        Same(OURS + "out_proj.weight", THEIRS + "o_proj.weight", (hidden, hidden)),
    ]


def _fast_weights(model: LactConfig) -> list[Mapping]:
    """The initial weights [heads, out, in], and what turns q and k into inputs of the fast-weight MLP."""
    heads, width, inner, rank = model.num_lact_heads, model.head_dim, model.inner_dim, model.w0_w2_low_rank
    found: list[Mapping] = [
        Same(OURS + name, THEIRS + name, (model.hidden_size, 2)) for name in ("qk_scale", "qk_offset")
    ]
    found.append(Same(OURS + "w1", THEIRS + "w1", (heads, width, inner)))
    for name in ("w0", "w2"):
        if rank <= 0:
            found.append(Same(OURS + name, THEIRS + name, (heads, inner, width)))
            continue
        found.append(Same(f"{OURS}{name}_left", f"{THEIRS}{name}.w_left", (heads, inner, rank)))
        found.append(Same(f"{OURS}{name}_right", f"{THEIRS}{name}.w_right", (heads, rank, width)))
    return found


def probe(model: LactConfig) -> LactConfig:
    """Chunks and a window that a short text fills several times."""
    return model.model_copy(update={"lact_chunk_size": 16, "window_size": 16})


FORMAT = Format(
    model_type="lact_swiglu",
    architecture="LaCTForCausalLM",
    library="lact_llm",
    fields=FIELDS
    | {
        "num_attn_heads": Key("num_attn_heads"),
        "num_lact_heads": Key("num_lact_heads"),
        "inter_multi": Key("inter_multi", 1.0),
        "lact_chunk_size": Key("lact_chunk_size"),
        "window_size": Key("window_size"),
        "rope_theta": Key("rope_theta"),
        "use_muon": Key("use_muon"),
        "use_momentum": Key("use_momentum"),
        "ttt_nope": Key("ttt_nope", False),
        "ttt_prenorm": Key("ttt_prenorm"),
        "qkv_bias": Key("qkv_bias", False),
        "qkv_silu": Key("qkv_silu", True),
        "no_v_silu": Key("no_v_silu", False),
        "learnable_ttt_scale": Key("learnable_ttt_scale"),
        "w0_w2_low_rank": Key("w0_w2_low_rank"),
        "fw_init_gain": Key("fw_init_gain"),
    },
    constants=CONSTANTS
    | {
        "attn_qk_norm": (False,),
        "lr_dim": (1,),
        "lr_parameterization": ("mamba",),
        "ttt_loss_type": ("dot_product",),
        "elementwise_affine": (True,),
    },
    ignored=IGNORED | dict.fromkeys(("use_fused_kernel", "fp32_states"), ABSENT),  # how it is computed
    frame=frame,
    probe=probe,
)
