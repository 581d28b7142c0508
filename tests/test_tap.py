"""Rows read beside a stream: values and gradients are those of an index, whatever else computes with the stream."""

import pytest
import torch
from torch import Tensor

from megatron_refine.kernels.tap import Tap

SEQUENCES, NUMBERS = torch.tensor([[0], [1], [1]]), torch.tensor([[3, 4], [0, 0], [6, 3]])  # one row twice


def results(way: str, uses: str) -> tuple[Tensor, Tensor]:
    """What was read, twice, and the gradient of x."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 7, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 2, 3, generator=generator, dtype=torch.float64)
    before = x * 2  # the gradient goes on from the tap
    if way == "tap":
        tap = Tap.on(before)
        stream, read = tap.stream, tap.read(SEQUENCES, NUMBERS) + tap.read(SEQUENCES, NUMBERS).square()
    else:
        stream, read = before, before[SEQUENCES, NUMBERS] + before[SEQUENCES, NUMBERS].square()
    loss = (read * weights).sum() if "read" in uses else torch.zeros((), dtype=torch.float64)
    if "all" in uses:
        loss = loss + stream.sin().sum()
    if "sum" in uses:  # its gradient is one number, broadcast
        loss = loss + stream.sum()
    (gradient,) = torch.autograd.grad(loss, x)
    return read, gradient


@pytest.mark.parametrize("uses", ["read", "all", "sum", "read all", "read sum", "read all sum"])
def test_a_tap_is_an_index(uses: str) -> None:
    for mine, theirs in zip(results("tap", uses), results("index", uses), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-14, atol=1e-14)  # fp64


def test_a_second_backward_pass_finds_the_same() -> None:
    x = torch.ones(1, 4, 2, requires_grad=True)
    tap = Tap.on(x * 1)
    loss = tap.read(torch.tensor([0]), torch.tensor([2])).sum() + (tap.stream**2).sum()
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first[0, :, 0].tolist() == [2, 2, 3, 2]
