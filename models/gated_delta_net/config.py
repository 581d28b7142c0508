"""The shape of a Gated DeltaNet. No torch, no Megatron: a configuration error is instant."""

from typing import ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from megatron_refine.config import ModelConfig
from megatron_refine.models.mixers.delta.slots import StateShape


class GatedDeltaNetConfig(ModelConfig):
    """Gated DeltaNet. Names and defaults follow the config.json of flash-linear-attention."""

    served: ClassVar[bool] = True

    family: Literal["gated_delta_net"] = Field(description="Gated DeltaNet (arXiv 2412.06464).")
    num_heads: int = Field(ge=1, description="Heads of the queries and keys. `tp*cp` must divide them.")
    head_dim: int = Field(256, ge=1, description="Width of a key head.")
    num_v_heads: int = Field(
        0, ge=0, validate_default=True, description="Heads of the values, a multiple of `model.num_heads`. 0: as many."
    )
    expand_v: float = Field(
        2.0,
        gt=0,
        validate_default=True,
        description="Width of a value head, as a multiple of `model.head_dim`. The product must be a whole number.",
    )
    conv_size: int = Field(4, ge=2, description="Taps of the short convolution on q, k and v.")
    use_gate: bool = Field(True, description="Multiply the normed output of each head by a SiLU gate.")
    allow_neg_eigval: bool = Field(False, description="Let beta, the write strength, lie in (0, 2). false: in (0, 1).")

    @property
    def value_heads(self) -> int:
        return self.num_v_heads or self.num_heads

    @property
    def head_dim_v(self) -> int:
        return round(self.head_dim * self.expand_v)

    @property
    def state_shape(self) -> StateShape:
        """What a server keeps of a request, over all ranks."""
        return StateShape(self.value_heads, self.head_dim, self.head_dim_v, self.num_heads, self.conv_size)

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
            raise ValueError(
                f"head_dim*expand_v = {width:.4g}, the width of a value head, must be whole; change either"
            )
        return expand
