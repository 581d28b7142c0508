"""The mixer of Gated DeltaNet (arXiv 2412.06464), which hybrids have too: the delta rule with decay, gated outputs."""

from dataclasses import dataclass

from megatron_refine.models.mixers.delta.cost import DeltaCost


@dataclass(frozen=True)
class GatedDelta:
    """The shape of a layer's mixer. Names are those of `model` in Gated DeltaNet's configuration."""

    hidden_size: int
    num_heads: int  # of the queries and keys
    head_dim: int  # of them
    value_heads: int  # a multiple of num_heads: each key head serves that many consecutive ones
    head_dim_v: int
    conv_size: int
    norm_eps: float  # of the norm of a head's output
    use_gate: bool = True
    allow_neg_eigval: bool = False  # beta in (0, 2) instead of (0, 1)

    @property
    def cost(self) -> DeltaCost:
        """What the layer costs."""
        heads, k, v = self.value_heads, self.head_dim, self.head_dim_v
        return DeltaCost(
            self.hidden_size, heads, k, v, channels=2 * self.num_heads * k + heads * v,
            others=heads * (2 + v * self.use_gate), conv_size=self.conv_size, vectors=2 * heads, gated_rule=True,
            gated_output=self.use_gate,
        )  # fmt: skip


MIXER = f"{__name__}.mixer:GatedDeltaMixer"
