"""The shape of a Qwen3-Next without experts. No torch, no Megatron: a configuration error is instant."""

from typing import Literal

from pydantic import Field

from megatron_refine.models.common.qwen.config import QwenConfig


class Qwen3NextConfig(QwenConfig):
    """Has the keys of Qwen's hybrids."""

    family: Literal["qwen3_next"] = Field(description="Qwen3-Next, with a dense MLP in each layer.")
