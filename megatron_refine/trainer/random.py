"""Random numbers as a pure function of counters.

There is no generator state, so a draw is the same at any layout and after any resume.
"""

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15, the increment of splitmix64 (Steele et al., 2014)
_FACTORS = (-4658895280553007687, -7723592293110705685)  # 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

SELECTION, ROLLOUT, TEXT = 0, 1, 2
"""The stream a counter belongs to: first argument of `uniform` after the seed."""


def uniform(seed: int, *counters: int | Tensor) -> Tensor:
    """fp64 in [0, 1), one for each element of the broadcast int64 counters."""
    tensors = torch.broadcast_tensors(
        *(torch.as_tensor(c, dtype=torch.int64, device=_device(counters)) for c in counters)
    )
    bits = splitmix64(torch.full_like(tensors[0], seed))
    for counter in tensors:
        bits = splitmix64((bits ^ counter) + _GOLDEN)
    return _shift(bits, 11).double() * 2.0**-53


def splitmix64(bits: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64, whose products wrap around."""
    bits = (bits ^ _shift(bits, 30)) * _FACTORS[0]
    bits = (bits ^ _shift(bits, 27)) * _FACTORS[1]
    return bits ^ _shift(bits, 31)


def _shift(bits: Tensor, places: int) -> Tensor:
    """Logical right shift."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def _device(counters: tuple[int | Tensor, ...]) -> torch.device | None:
    return next((c.device for c in counters if isinstance(c, Tensor)), None)
