"""The shape of an Olmo-Hybrid. No torch, no Megatron: a configuration error is instant."""

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from megatron_refine.models.common.hybrid import HybridConfig
from megatron_refine.models.mixers.attention.config import AttentionConfig
from megatron_refine.models.mixers.gated_delta import GatedDelta

HEAD_EPS = 1e-5  # of the norm of a linear head's output, whatever the others' is


class OlmoHybridConfig(HybridConfig):
    """Gated DeltaNet layers, and softmax attention layers among them. Names and defaults follow config.json."""

    family: Literal["olmo_hybrid"] = Field(description="Olmo-Hybrid.")
    num_attention_heads: int = Field(
        ge=1, validate_default=True, description="Query heads of the attention layers. They divide `model.hidden_size`."
    )
    rope_theta: float = Field(
        0.0, ge=0, description="Base of the rotary position embedding of the attention layers. 0: no positions."
    )
    linear_allow_neg_eigval: bool = Field(
        True, description="Let beta, the write strength, lie in (0, 2). false: in (0, 1)."
    )

    @property
    def head_dim(self) -> int:
        """Width of a head of the attention layers."""
        return self.hidden_size // self.num_attention_heads

    @property
    def linear(self) -> GatedDelta:
        """The mixer of a linear layer."""
        return GatedDelta(
            self.hidden_size, self.linear_num_key_heads, self.linear_key_head_dim, self.linear_num_value_heads,
            self.linear_value_head_dim, self.linear_conv_kernel_dim, HEAD_EPS,
            allow_neg_eigval=self.linear_allow_neg_eigval,
        )  # fmt: skip

    @property
    def full(self) -> AttentionConfig:
        """The mixer of a softmax attention layer."""
        rotary = self.head_dim if self.rope_theta else 0
        return AttentionConfig(
            self.hidden_size, self.num_attention_heads, self.num_key_value_heads, self.head_dim, qk_norm="projection",
            rotary_dims=rotary, rope_theta=self.rope_theta or 1.0, eps=self.norm_eps,
        )  # fmt: skip

    @field_validator("num_attention_heads")
    @classmethod
    def _whole_heads(cls, heads: int, info: ValidationInfo) -> int:
        hidden = info.data.get("hidden_size")
        if hidden is not None and hidden % heads:
            raise ValueError(f"must divide model.hidden_size={hidden}; change either")
        return heads
