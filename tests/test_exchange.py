"""What ranks tell one another: any plain value and tensors of unequal sizes arrive whole, and nothing else is sent."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_refine.exchange import everyone, everyones_tensors
from tests.zygote import Zygote

VALUE = {
    "text": "é ☃ \udc00", ("a", 2): [None, True, -7, 0.1, math.inf], 3: ({"dict": [1]}, {"tuple": []}, []), "": {},
}  # fmt: skip


def exchanged() -> Any:
    """On a rank: values and tensors of all ranks, then within pairs."""
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2])]
    mine = pairs[rank // 2]
    tensors = {f"of {rank}": torch.full((rank, 2), rank, dtype=torch.bfloat16).T} if rank else {}
    with pytest.raises(TypeError):
        everyone(torch.ones(1))  # on every rank: none waits for another
    return everyone([VALUE] * rank), everyone(rank, mine), everyones_tensors(tensors)


def test_everyones_values(ranks: Zygote) -> None:
    for rank, (values, pair, tensors) in enumerate(ranks(3, exchanged)):
        assert values == [[], [VALUE], [VALUE] * 2]
        assert pair == ([0, 1] if rank < 2 else [2])
        assert [list(part) for part in tensors] == [[], ["of 1"], ["of 2"]]
        assert tensors[2]["of 2"].equal(torch.full((2, 2), 2, dtype=torch.bfloat16))
