"""The shape of a LaCT model. No torch, no Megatron: a configuration error is instant."""

from typing import ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from megatron_refine.config import ModelConfig


class LactConfig(ModelConfig):
    """LaCT: fast weights W0, W1, W2 beside a sliding-window attention.

    Names and defaults follow the config.json of the authors' released language models.
    """

    served: ClassVar[bool] = True

    family: Literal["lact"] = Field(description="LaCT (arXiv 2505.23884).")
    num_lact_heads: int = Field(
        4, ge=1, description="Fast-weight heads. `tp*cp` must divide them, and they `model.hidden_size`."
    )
    num_attn_heads: int = Field(
        ge=1,
        validate_default=True,
        description="Heads of the sliding-window attention, a multiple of `model.num_lact_heads`. Their double must "
        "divide `model.hidden_size`.",
    )
    inter_multi: float = Field(
        1.0, gt=0, description="Inner width of the fast weights, as a multiple of the width of their head."
    )
    lact_chunk_size: int = Field(2048, ge=1, description="Tokens between two updates of the fast weights.")
    window_size: int = Field(2048, ge=2, description="Tokens that the attention sees, the current one included.")
    rope_theta: float = Field(1e6, gt=0, description="Base of the rotary position embedding.")
    ttt_nope: bool = Field(
        False, description="Leave the rotary positions out of the queries and keys of the fast weights."
    )
    ttt_prenorm: bool = Field(
        False,
        description="Add updates up before the rows of the fast weights are scaled to their initial length. false: "
        "scale after each update, and add the next one to that.",
    )
    use_muon: bool = Field(False, description="Make the updates of the fast weights orthogonal (Muon).")
    use_momentum: bool = Field(
        True, description="Give the updates momentum, by a factor that is predicted from each token."
    )
    learnable_ttt_scale: bool = Field(
        True, description="Scale what is read from the fast weights by a factor that is predicted per token and head."
    )
    w0_w2_low_rank: int = Field(
        32,
        ge=-1,
        description="Initial W0 and W2 are 0.5 I plus a product of this rank. 0 or less: full matrices.",
    )
    fw_init_gain: float = Field(
        0.5, gt=0, description="Gain of the initial weights of that product: a factor on their standard deviation."
    )
    qkv_silu: bool = Field(True, description="Apply SiLU to q, k and v of the fast weights.")
    no_v_silu: bool = Field(False, description="Leave SiLU out on v.")
    qkv_bias: bool = Field(False, description="Give q, k and v a bias.")

    @property
    def head_dim(self) -> int:
        """Width D of a fast-weight head."""
        return self.hidden_size // self.num_lact_heads

    @property
    def inner_dim(self) -> int:
        """Inner width I of a head's fast weights."""
        return int(self.head_dim * self.inter_multi)

    @property
    def planes(self) -> int:
        """Times three matrices [I, D] that a server keeps of a head: W, G; T (prenorm); M (momentum)."""
        return 2 + self.ttt_prenorm + self.use_momentum

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
