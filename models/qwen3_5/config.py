"""The shape of a Qwen3.5 text model. No torch, no Megatron: a configuration error is instant."""

from typing import ClassVar, Literal

from pydantic import Field

from megatron_refine.models.common.qwen.config import QwenConfig


class Qwen35Config(QwenConfig):
    """Has the keys of Qwen's hybrids."""

    served: ClassVar[bool] = True

    family: Literal["qwen3_5"] = Field(description="Qwen3.5, the dense text models.")
