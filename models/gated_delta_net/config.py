"""The shape of a Gated DeltaNet. No torch, no Megatron: a configuration error is instant."""

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from megatron_refine.config import ModelConfig


class GatedDeltaNetConfig(ModelConfig):
    """Names and defaults follow the config.json of flash-linear-attention's Gated DeltaNet."""

    family: Literal["gated_delta_net"]
    num_heads: int = Field(ge=1, description="heads of the keys")
    head_dim: int = Field(256, ge=1, description="width of a head's keys")
    num_v_heads: int = Field(0, ge=0, validate_default=True, description="heads of the values; 0: num_heads")
    expand_v: float = Field(2.0, gt=0, validate_default=True, description="width of a head's values / head_dim")
    conv_size: int = Field(4, ge=2, description="taps of the short convolution on q, k and v")
    use_gate: bool = Field(True, description="gate the output")
    allow_neg_eigval: bool = Field(False, description="beta in (0, 2) instead of (0, 1)")

    @property
    def value_heads(self) -> int:
        return self.num_v_heads or self.num_heads

    @property
    def head_dim_v(self) -> int:
        return round(self.head_dim * self.expand_v)

    def tp_limit(self) -> int:
        """Number of key heads: tensor parallelism shards every mixer tensor by them."""
        return self.num_heads

    @field_validator("num_v_heads")
    @classmethod
    def _whole_groups(cls, count: int, info: ValidationInfo) -> int:
        heads = info.data.get("num_heads")
        if heads is not None and count % heads:
            raise ValueError(f"must be a multiple of model.num_heads={heads}, or 0; change either")
        return count

    @field_validator("expand_v")
    @classmethod
    def _whole_width(cls, expand: float, info: ValidationInfo) -> float:
        width = info.data.get("head_dim", 1) * expand
        if width < 0.5 or abs(width - round(width)) > 1e-6:
            raise ValueError(f"head_dim*expand_v = {width:.4g} is the width of a value head and must be whole")
        return expand
