"""The shape of a DeltaNet. No torch, no Megatron: a configuration error is instant."""

from typing import ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from megatron_refine.config import ModelConfig
from megatron_refine.models.mixers.delta.slots import StateShape


class DeltaNetConfig(ModelConfig):
    """DeltaNet. Names and defaults follow the config.json of released checkpoints."""

    served: ClassVar[bool] = True

    family: Literal["delta_net"] = Field(description="DeltaNet (arXiv 2406.06484).")
    num_heads: int = Field(ge=1, description="Heads of the mixer. `tp*cp` must divide them.")
    expand_k: float = Field(
        1.0,
        gt=0,
        validate_default=True,
        description="Width of all keys, as a multiple of `model.hidden_size`. A head's share must be a whole number.",
    )
    expand_v: float = Field(
        1.0,
        gt=0,
        validate_default=True,
        description="Width of all values, as a multiple of `model.hidden_size`. A head's share must be a whole number.",
    )
    conv_size: int = Field(4, ge=2, description="Taps of the short convolution on q, k and v.")
    allow_neg_eigval: bool = Field(False, description="Let beta, the write strength, lie in (0, 2). false: in (0, 1).")

    @property
    def head_dim_k(self) -> int:
        return round(self.hidden_size * self.expand_k / self.num_heads)

    @property
    def head_dim_v(self) -> int:
        return round(self.hidden_size * self.expand_v / self.num_heads)

    @property
    def state_shape(self) -> StateShape:
        """What a server keeps of a request, over all ranks."""
        return StateShape(self.num_heads, self.head_dim_k, self.head_dim_v, self.num_heads, self.conv_size)

    def tp_limit(self) -> int:
        """Number of heads: tensor parallelism shards every mixer tensor by heads."""
        return self.num_heads

    @field_validator("expand_k", "expand_v")
    @classmethod
    def _whole_heads(cls, expand: float, info: ValidationInfo) -> float:
        hidden, heads = info.data.get("hidden_size"), info.data.get("num_heads")
        if hidden is None or heads is None:  # invalid themselves, and reported as such
            return expand
        width = hidden * expand / heads
        if width < 0.5 or abs(width - round(width)) > 1e-6:
            raise ValueError(
                f"hidden_size*{info.field_name}/num_heads = {hidden}*{expand:g}/{heads} = {width:.4g} is the width of "
                "a head and must be a whole number; change num_heads"
            )
        return expand
