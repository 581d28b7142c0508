"""Qwen3.5's text model in Hugging Face's format, as transformers 5.24 writes it."""

from typing import Any

from megatron_refine.models.hf import ABSENT, IGNORED, Format, Key, Mapping, frame
from megatron_refine.models.mixers.gated_delta import hf as gated_delta
from megatron_refine.models.qwen3_5.config import Qwen35Config

OURS, THEIRS = "decoder.layers.{}.self_attention.", "model.layers.{}.linear_attn."
EMBEDDING, NORMS = "model.embed_tokens.weight", ("input_layernorm", "post_attention_layernorm")
ROPE, TEXT = "rope_parameters", "text_config"
# of a model with vision, beside the text model's fields
AROUND = ("vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def linear_tensors(model: Qwen35Config) -> list[Mapping]:
    """List those of a linear layer's mixer: q, k and v fused."""
    names = dict.fromkeys("qkv", "in_proj_qkv") | {"g": "in_proj_z", "a": "in_proj_a", "b": "in_proj_b"}
    return gated_delta.tensors(model.linear, OURS, THEIRS, names, dict.fromkeys("qkv", "conv1d"), "norm", "out_proj")


def read(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the text model's fields, those of rope_parameters by names of their own."""
    if isinstance(tree.get(TEXT), dict):
        around = {name: value for name, value in tree.items() if name not in (TEXT, *AROUND)}
        tree = tree[TEXT] | around
    found = {name: value for name, value in tree.items() if name != ROPE}
    rope = tree.get(ROPE) or {}
    found |= {f"{ROPE}.{name}": value for name, value in rope.items()}
    if not found.get("layer_types"):
        every, count = found.get("full_attention_interval") or 4, found.get("num_hidden_layers") or 0
        kinds = ("linear_attention", "full_attention")
        found["layer_types"] = [kinds[(i + 1) % every == 0] for i in range(count)]
    return found


def write(fields: dict[str, Any]) -> dict[str, Any]:
    """Return config.json: the inverse of `read`."""
    nested = {name.removeprefix(f"{ROPE}."): value for name, value in fields.items() if name.startswith(f"{ROPE}.")}
    return {name: value for name, value in fields.items() if not name.startswith(f"{ROPE}.")} | {ROPE: nested}


FORMAT = Format(
    model_type="qwen3_5_text",
    also=("qwen3_5",),
    architecture="Qwen3_5ForCausalLM",
    library="transformers",
    fields={
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
    },
    constants={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "attention_dropout": (0.0,),
        "attn_output_gate": (True,),
        "mlp_only_layers": ([],),
        f"{ROPE}.rope_type": ("default",),
        "quantization_config": (None,),
    },
    ignored={
        name: value for name, value in IGNORED.items() if not name.startswith("fuse_")
    } | {
        # where the kinds of layers and the angles are said again, and what the text model does not read
        "full_attention_interval": ABSENT, "partial_rotary_factor": ABSENT,
        f"{ROPE}.mrope_section": [11, 11, 10], f"{ROPE}.mrope_interleaved": True,
        "mamba_ssm_dtype": "float32", "mtp_num_hidden_layers": ABSENT,
        "mtp_use_dedicated_embeddings": ABSENT, "output_gate_type": ABSENT,
    },
    frame=lambda model: frame(model, EMBEDDING),
    renamed={"model.language_model.*": "model.{}"},
    unused=("mtp.*", "model.visual.*"),
    read=read,
    write=write,
)  # fmt: skip
