"""A softmax attention layer in Hugging Face's format, as Qwen3.5 and Olmo-Hybrid write it: a part of a family's."""

from megatron_refine.models.hf import Heads, Mapping, Same
from megatron_refine.models.mixers.attention.config import AttentionConfig


def tensors(layer: AttentionConfig, ours: str, theirs: str) -> list[Mapping]:
    """Every tensor of the mixer. ours, theirs: what stands before the names, with {} for the number of the layer."""
    hidden, dim = layer.hidden, layer.head_dim
    widths = {"head": (dim, dim), "projection": (layer.heads * dim, layer.kv_heads * dim), "none": ()}[layer.qk_norm]
    return [
        Same(ours + "q_proj", theirs + "q_proj.weight", (layer.heads * layer.query_width, hidden)),
        Heads(
            ours + "kv_proj",
            ((theirs + "k_proj.weight", dim), (theirs + "v_proj.weight", dim)),
            layer.kv_heads,
            (hidden,),
        ),
        *(Same(f"{ours}{x}_norm", f"{theirs}{x}_norm.weight", (w,)) for x, w in zip("qk", widths, strict=False)),
        Same(ours + "out_proj.weight", theirs + "o_proj.weight", (hidden, layer.heads * dim)),
    ]
