"""The shape of a softmax attention layer. No torch, no Megatron."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class AttentionConfig:
    """A layer's shape; heads are those of all ranks. Query head h reads key head h // (heads / kv_heads)."""

    hidden: int
    heads: int
    kv_heads: int  # divide the heads
    head_dim: int
    gate: bool = False  # outputs times sigmoid of as many more columns
    qk_norm: Literal["none", "head", "projection"] = "none"  # over each head, or over all heads together
    zero_centred: bool = False  # norms multiply by 1 + weight
    rotary_dims: int = 0  # of a head, the first; even. 0: no position encoding
    rope_theta: float = 10000.0
    eps: float = 1e-6  # of the norms

    @property
    def query_width(self) -> int:
        """Columns of a query head, with its gate."""
        return self.head_dim * (2 if self.gate else 1)

    def units(self, ranks: int) -> int:
        """Key heads, with their query heads, that `ranks` = tp * cp ranks share evenly: some of them repeated where
        there are too few. They must divide the query heads."""
        return math.lcm(self.kv_heads, ranks)
