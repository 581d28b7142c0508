"""Qwen3.5's text model in Hugging Face's format, as transformers 5.24 writes it."""

from typing import Any

from megatron_refine.models.common import hybrid_hf as hybrid
from megatron_refine.models.common.qwen import hf as qwen
from megatron_refine.models.hf import ABSENT, Format

TEXT = "text_config"
# of a model with vision, beside the text model's fields
AROUND = ("vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def read(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the text model's fields."""
    if isinstance(tree.get(TEXT), dict):
        around = {name: value for name, value in tree.items() if name not in (TEXT, *AROUND)}
        tree = tree[TEXT] | around
    return qwen.read(tree)


FORMAT = Format(
    model_type="qwen3_5_text",
    also=("qwen3_5",),
    architecture="Qwen3_5ForCausalLM",
    library="transformers",
    fields=qwen.FIELDS,
    constants=hybrid.CONSTANTS | {"attn_output_gate": (True,), "mlp_only_layers": ([],)},
    ignored=qwen.IGNORED | {
        # what the text model does not read
        f"{hybrid.ROPE}.mrope_section": [11, 11, 10], f"{hybrid.ROPE}.mrope_interleaved": True,
        "mamba_ssm_dtype": "float32", "mtp_num_hidden_layers": ABSENT,
        "mtp_use_dedicated_embeddings": ABSENT, "output_gate_type": ABSENT,
    },
    frame=hybrid.around,
    renamed={"model.language_model.*": "model.{}"},
    unused=("mtp.*", "model.visual.*"),
    read=read,
    write=qwen.write,
)  # fmt: skip
