"""Qwen3.5's dense text models: Gated DeltaNet layers, and a softmax attention layer after every three of them."""

from megatron_refine.models.common import qwen
from megatron_refine.models.family import Family
from megatron_refine.models.qwen3_5.config import Qwen35Config
from megatron_refine.models.qwen3_5.hf import FORMAT

# q, k and v in one tensor, one below the other
PROJECTIONS = dict.fromkeys("qkv", "in_proj_qkv") | {"g": "in_proj_z", "a": "in_proj_a", "b": "in_proj_b"}

FAMILY = Family(
    "qwen3_5", Qwen35Config, lambda model: qwen.layers(model, PROJECTIONS), FORMAT, f"{__name__}.reference:logits",
    qwen.serving("megatron_refine.models.common.qwen.serve"),
)  # fmt: skip
