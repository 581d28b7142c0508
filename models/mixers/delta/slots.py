"""What a server keeps of a request in a layer of the delta rule. No torch, no SGLang."""

from dataclasses import dataclass

from megatron_refine.models.family import Slot


@dataclass(frozen=True)
class StateShape:
    """Shape of a layer's state, over all ranks."""

    heads: int  # H, of the values
    key_dim: int  # K
    value_dim: int  # V
    key_heads: int  # heads of queries and keys
    conv_size: int  # W

    @property
    def blocks(self) -> tuple[int, int, int]:
        """Columns that pass the convolution: queries, keys, values."""
        keys = self.key_heads * self.key_dim
        return keys, keys, self.heads * self.value_dim

    @property
    def channels(self) -> int:
        """All of them."""
        return sum(self.blocks)

    def slot(self, tp: int) -> Slot:
        """Return what each of `tp` ranks keeps."""
        conv = self.channels // tp, self.conv_size - 1
        return Slot([conv], (self.heads // tp, self.key_dim, self.value_dim))
