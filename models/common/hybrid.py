"""What the configurations of hybrids share: two kinds of layers, linear ones and softmax attention."""

import math
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from megatron_refine.config import ModelConfig

Kind = Literal["linear_attention", "full_attention"]


def pattern(layers: int, every: int = 4) -> list[Kind]:
    """Return the kinds of a model's layers where none are named: each `every`-th is a full attention layer."""
    return ["full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(layers)]


class HybridConfig(ModelConfig):
    """Gated DeltaNet layers, and softmax attention layers among them. A family adds the widths of the linear heads."""

    num_attention_heads: int = Field(ge=1, description="Query heads of the attention layers.")
    num_key_value_heads: int = Field(
        ge=1, validate_default=True, description="Key heads of the attention layers. They divide the query heads."
    )
    linear_num_key_heads: int = Field(ge=1, description="Heads of the queries and keys of the linear layers.")
    linear_num_value_heads: int = Field(
        ge=1, validate_default=True, description="Heads of their values, a multiple of the key heads."
    )
    linear_key_head_dim: int = Field(ge=1, description="Width of their key heads.")
    linear_value_head_dim: int = Field(ge=1, description="Width of their value heads.")
    linear_conv_kernel_dim: int = Field(4, ge=2, description="Taps of their short convolution.")
    layer_types: list[Kind] = Field(
        default_factory=list,
        validate_default=True,
        description="The kind of each layer. Empty: every fourth is a full attention layer.",
    )

    @property
    def kinds(self) -> list[Kind]:
        """The kind of each layer."""
        return self.layer_types or pattern(self.num_layers)

    def tp_limit(self) -> int:
        """Number of shards that both kinds of layers can be cut into."""
        return math.gcd(self.linear_num_key_heads, self.num_attention_heads)

    @field_validator("num_key_value_heads")
    @classmethod
    def _whole_groups(cls, count: int, info: ValidationInfo) -> int:
        heads = info.data.get("num_attention_heads")
        if heads is not None and heads % count:
            raise ValueError(f"must divide model.num_attention_heads={heads}; change either")
        return count

    @field_validator("linear_num_value_heads")
    @classmethod
    def _whole_value_groups(cls, count: int, info: ValidationInfo) -> int:
        heads = info.data.get("linear_num_key_heads")
        if heads is not None and count % heads:
            raise ValueError(f"must be a multiple of model.linear_num_key_heads={heads}; change either")
        return count

    @field_validator("layer_types")
    @classmethod
    def _one_a_layer(cls, kinds: list[Kind], info: ValidationInfo) -> list[Kind]:
        layers = info.data.get("num_layers")
        if kinds and layers is not None and len(kinds) != layers:
            raise ValueError(f"names {len(kinds)} layers, model.num_layers={layers}; change either")
        return kinds
