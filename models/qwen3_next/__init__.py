"""Qwen3-Next without experts: the layers of Qwen3.5 under other names of tensors."""

from megatron_refine.models.common import qwen
from megatron_refine.models.family import Family
from megatron_refine.models.qwen3_next.config import Qwen3NextConfig
from megatron_refine.models.qwen3_next.hf import FORMAT

# two tensors, in each of which a key head's parts lie together
PROJECTIONS = dict.fromkeys("qkvg", "in_proj_qkvz") | dict.fromkeys("ba", "in_proj_ba")

FAMILY = Family(
    "qwen3_next", Qwen3NextConfig, lambda model: qwen.layers(model, PROJECTIONS, ("qkvg", "ba")), FORMAT,
    f"{__name__}.reference:logits",
)  # fmt: skip
