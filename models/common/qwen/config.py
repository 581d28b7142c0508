"""The shape of Qwen's hybrids. No torch, no Megatron: a configuration error is instant."""

from pydantic import Field

from megatron_refine.models.common.hybrid import HybridConfig
from megatron_refine.models.mixers.attention.config import AttentionConfig
from megatron_refine.models.mixers.delta.slots import StateShape
from megatron_refine.models.mixers.gated_delta import GatedDelta


class QwenConfig(HybridConfig):
    """Gated DeltaNet layers, and gated softmax attention layers among them. Names and defaults follow config.json."""

    head_dim: int = Field(256, ge=1, description="Width of a head of the attention layers.")
    partial_rotary_factor: float = Field(
        0.25, gt=0, le=1, description="Share of an attention head that the rotary position embedding turns."
    )
    rope_theta: float = Field(1e7, gt=0, description="Base of the rotary position embedding.")
    linear_num_key_heads: int = Field(16, ge=1, description="Heads of the queries and keys of the linear layers.")
    linear_num_value_heads: int = Field(
        32, ge=1, validate_default=True, description="Heads of their values, a multiple of the key heads."
    )
    linear_key_head_dim: int = Field(128, ge=1, description="Width of their key heads.")
    linear_value_head_dim: int = Field(128, ge=1, description="Width of their value heads.")

    @property
    def rotary_dims(self) -> int:
        """Dimensions of an attention head that are turned."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def linear(self) -> GatedDelta:
        """The mixer of a linear layer."""
        return GatedDelta(
            self.hidden_size, self.linear_num_key_heads, self.linear_key_head_dim, self.linear_num_value_heads,
            self.linear_value_head_dim, self.linear_conv_kernel_dim, self.norm_eps,
        )  # fmt: skip

    @property
    def state_shape(self) -> StateShape:
        """What a server keeps of a request in a linear layer, over all ranks."""
        x = self.linear
        return StateShape(x.value_heads, x.head_dim, x.head_dim_v, x.num_heads, x.conv_size)

    @property
    def full(self) -> AttentionConfig:
        """The mixer of a softmax attention layer."""
        return AttentionConfig(
            self.hidden_size, self.num_attention_heads, self.num_key_value_heads, self.head_dim, gate=True,
            qk_norm="head", zero_centred=True, rotary_dims=self.rotary_dims, rope_theta=self.rope_theta,
            eps=self.norm_eps,
        )  # fmt: skip
