"""The shape of a LaCT model. No torch, no Megatron: a configuration error is instant."""

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from megatron_refine.config import ModelConfig


class LactConfig(ModelConfig):
    """Names and defaults follow the config.json of the authors' released language models."""

    family: Literal["lact"]
    num_lact_heads: int = Field(4, ge=1, description="fast-weight heads")
    num_attn_heads: int = Field(ge=1, validate_default=True, description="heads of the sliding-window attention")
    inter_multi: float = Field(1.0, gt=0, description="inner width of the fast weights / width of their head")
    lact_chunk_size: int = Field(2048, ge=1, description="tokens between updates of the fast weights")
    window_size: int = Field(2048, ge=2, description="tokens that the attention sees, the current one included")
    rope_theta: float = Field(1e6, gt=0)
    ttt_nope: bool = Field(False, description="no position in the queries and keys of the fast weights")
    ttt_prenorm: bool = Field(False, description="steps add up before rows are scaled to their first length")
    use_muon: bool = Field(False, description="orthogonal steps")
    use_momentum: bool = Field(True, description="a momentum learned per token")
    learnable_ttt_scale: bool = Field(True, description="a scale per token and head on what is read")
    w0_w2_low_rank: int = Field(
        32, ge=-1, description="rank of the initial W0 and W2 beside 0.5 I; <= 0: whole matrices"
    )
    fw_init_gain: float = Field(0.5, gt=0, description="of the initial low-rank weights")
    qkv_silu: bool = Field(True, description="SiLU on q, k and v of the fast weights")
    no_v_silu: bool = Field(False, description="no SiLU on v")
    qkv_bias: bool = Field(False)

    @property
    def head_dim(self) -> int:
        """Width D of a fast-weight head."""
        return self.hidden_size // self.num_lact_heads

    @property
    def inner_dim(self) -> int:
        """Inner width I of a head's fast weights."""
        return int(self.head_dim * self.inter_multi)

    def tp_limit(self) -> int:
        """Number of fast-weight heads: tensor parallelism shards every mixer tensor by them."""
        return self.num_lact_heads

    @field_validator("num_lact_heads")
    @classmethod
    def _whole_fast_heads(cls, heads: int, info: ValidationInfo) -> int:
        hidden = info.data.get("hidden_size", heads)
        if hidden % heads:
            raise ValueError(f"must divide model.hidden_size={hidden}; change either")
        return heads

    @field_validator("num_attn_heads")
    @classmethod
    def _whole_heads(cls, heads: int, info: ValidationInfo) -> int:
        hidden, fast = info.data.get("hidden_size"), info.data.get("num_lact_heads")
        if hidden is None or fast is None:  # invalid themselves, and reported as such
            return heads
        if heads % fast or hidden % (2 * heads):
            raise ValueError(
                f"must be a multiple of model.num_lact_heads={fast}, and its double must divide "
                f"model.hidden_size={hidden}; change one of them"
            )
        return heads
