"""Checksums of weights as SGLang 0.5.23 computes them (its /weights_checker), so that both sides can be compared.

On a CPU the first 8 bytes of SHA-256 over the tensor's bytes. On a GPU a hash of its kernel `gpu_tensor_hash`: 32-bit
words, each mixed with its place by MurmurHash3's finaliser, added up in tiles of 8192, tiles added in 64 bits.
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_refine.trainer.random import splitmix64

_MASK = 0xFFFFFFFF
_MIX = (0x85EBCA6B, 0xC2B2AE35)
_SEED = 0x243F6A88
_STREAMS = ((0x27D4EB2D, _SEED, 15), (0x165667B1, (_SEED * 0x9E3779B1 ^ 0xDEADBEEF) & _MASK, 13))
_TILE, _TILES_AT_ONCE = 8192, 256


def checksum(tensor: Tensor, device: str) -> str:
    """16 hexadecimal digits. device: where the server keeps its weights, `cpu` or `cuda`."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if device == "cpu":
        return hashlib.sha256(flat.cpu().numpy().data).digest()[:8].hex()
    return f"{_tiled_hash(flat):016x}"


def _tiled_hash(flat: Tensor) -> int:
    """Of bytes [n], on the device where they are."""
    words = F.pad(flat, (0, -len(flat) % 4)).view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)  # wraps around, as 64 bits do
    for first in range(0, len(words), _TILE * _TILES_AT_ONCE):
        part = words[first : first + _TILE * _TILES_AT_ONCE].long() & _MASK
        place = (torch.arange(len(part), device=part.device) + first) & _MASK
        sums = [_tile_sums(part, place, *stream) for stream in _STREAMS]
        high, low = (_finalise(s ^ (len(words) * 4 & _MASK)) for s in sums)
        total += ((high << 32) + low).sum()
    return int(splitmix64(total)) & (1 << 64) - 1


def _tile_sums(words: Tensor, place: Tensor, factor: int, seed: int, turn: int) -> Tensor:
    """[W] words and their places -> [tiles], modulo 2^32."""
    turned = (place << turn | place >> (32 - turn)) & _MASK
    mixed = _finalise(words ^ ((place * factor + seed) & _MASK ^ turned))
    return F.pad(mixed, (0, -len(mixed) % _TILE)).view(-1, _TILE).sum(1) & _MASK


def _finalise(x: Tensor) -> Tensor:
    """MurmurHash3's fmix32, on 32-bit numbers in int64."""
    x = (x ^ x >> 16) * _MIX[0] & _MASK
    x = (x ^ x >> 13) * _MIX[1] & _MASK
    return x ^ x >> 16
