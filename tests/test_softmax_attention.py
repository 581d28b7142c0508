"""Softmax attention with grouped key heads has the values and gradients of the whole matrix; memory linear in rows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from megatron_refine.bench.timing import saved_bytes
from megatron_refine.kernels import softmax_attention
from megatron_refine.kernels.places import Places
from megatron_refine.kernels.softmax_attention import branch_attention, causal_attention, in_turns
from megatron_refine.kernels.softmax_attention.gpu import flex_prefix_attention
from megatron_refine.kernels.softmax_attention.reference import full_attention, full_branch_attention

EXACT = {"rtol": 1e-10, "atol": 1e-10}  # fp64: the same few hundred terms of about 1, in another order
Inputs = list[Tensor]


def drawn(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Inputs:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(s, generator=generator, dtype=dtype).mul_(1.5).requires_grad_() for s in shapes]


def agree(found: Callable[..., Tensor], expected: Callable[..., Tensor], inputs: Inputs) -> None:
    """In values and in the gradient of every input."""
    values = [function(*inputs) for function in (found, expected)]
    torch.testing.assert_close(*values, **EXACT)
    weights = torch.randn(values[0].shape, generator=torch.Generator().manual_seed(4), dtype=values[0].dtype)
    gradients = [torch.autograd.grad((value * weights).sum(), inputs) for value in values]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


@pytest.mark.parametrize("way", [causal_attention, in_turns])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
def test_a_stream_equals_the_whole_matrix(way: Any, heads: int, groups: int) -> None:
    agree(way, full_attention, drawn((2, 37, heads, 8), (2, 37, groups, 8), (2, 37, groups, 8)))


# sequence and tokens before: both ends of a sequence, one twice, sequences with several, one and no branches
PLACES = {"of each": [(0, 1), (0, 30), (1, 7), (1, 7)], "uneven": [(2, 30), (0, 29), (0, 1), (0, 16)]}


def branches(where: str, n: int, rows: int, own: int, groups: int = 2) -> tuple[Places, Inputs]:
    """Places, and q, prefix k, v of three sequences of 30 tokens, own k, v."""
    sequences, tokens = torch.tensor(PLACES[where]).unbind(1)
    count, prefix, fresh = n * len(tokens), (3, 30, groups, 8), (n * len(tokens), own, groups, 8)
    return Places.read(sequences, tokens), drawn((count, rows, 4, 8), prefix, prefix, fresh, fresh)


def called(function: Any, places: Places) -> Callable[..., Tensor]:
    return lambda q, k, v, own_k, own_v: function(q, (k, v), (own_k, own_v), places)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize(("n", "rows", "own"), [(1, 1, 1), (3, 5, 5), (2, 2, 6)])  # the last: others were fed before
@pytest.mark.parametrize("groups", [4, 2])
def test_branches_equal_their_whole_prefixes(where: str, n: int, rows: int, own: int, groups: int) -> None:
    places, inputs = branches(where, n, rows, own, groups)
    agree(called(branch_attention, places), called(full_branch_attention, places), inputs)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("where", PLACES)
def test_flex_attention_reads_the_same(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled, with the gradients that torch has for it but does not offer on a CPU."""
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(softmax_attention, "torch_prefix_attention", flex_prefix_attention)
    places, inputs = branches(where, n=3, rows=5, own=5)
    agree(called(branch_attention, places), called(full_branch_attention, places), inputs)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 2e-2), (torch.float32, 2e-3)])  # TF32 in the latter
def test_attention_on_a_gpu(dtype: torch.dtype, limit: float) -> None:
    """Relative error (L2) of values and gradients, against the whole matrix in fp64 on the rounded inputs."""
    places, inputs = branches("of each", n=3, rows=5, own=5)
    inputs = [torch.cat([x] * 8, -1).detach() for x in inputs]  # heads of 64
    moved = Places.read(places.sequences.cuda(), places.tokens.cuda())
    stream = [inputs[1].repeat(1, 20, 2, 1), *(x.repeat(1, 20, 1, 1) for x in inputs[1:3])]
    for found, expected, given in [
        (called(branch_attention, moved), called(full_branch_attention, places), inputs),
        (causal_attention, full_attention, stream),
    ]:
        low = [x.to("cuda", dtype).requires_grad_() for x in given]
        high = [x.detach().cpu().double().requires_grad_() for x in low]
        results = [(y := f(*x), *torch.autograd.grad(y.sin().sum(), x)) for f, x in ((found, low), (expected, high))]
        for mine, theirs in zip(*results, strict=True):
            assert (mine.cpu().double() - theirs).norm() < limit * theirs.norm()


def test_half_precision_is_rounded_once() -> None:
    """Scores, softmax and sums in fp32: the error is that of one rounding of the result to bf16, 2^-9 of it."""
    places, inputs = branches("uneven", n=3, rows=5, own=5)
    low = [x.detach().bfloat16() for x in inputs]
    found, expected = (called(branch_attention, places)(*x) for x in (low, [x.double() for x in low]))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-5)


def test_one_token_after_the_other_equals_the_branch() -> None:
    places, (q, k, v, own_k, own_v) = branches("of each", n=2, rows=6, own=6)
    whole = branch_attention(q, (k, v), (own_k, own_v), places)
    steps = [
        branch_attention(q[:, i : i + 1], (k, v), (own_k[:, : i + 1], own_v[:, : i + 1]), places) for i in range(6)
    ]
    torch.testing.assert_close(torch.cat(steps, 1), whole, **EXACT)


def kept(length: int, count: int, n: int) -> int:
    """Bytes that a packed pass keeps: a stream of two sequences, branches at `count` places of each, 4 rows each."""
    places = Places.of_each(torch.linspace(1, length, count).long().repeat(2, 1))
    q, k, v, fork_q, own_k, own_v = drawn(
        (2, length, 4, 8), (2, length, 2, 8), (2, length, 2, 8), *[(2 * count * n, 4, h, 8) for h in (4, 2, 2)]
    )

    def run() -> None:
        causal_attention(q, k, v)
        branch_attention(fork_q, (k, v), (own_k, own_v), places)

    return saved_bytes(run)


def test_memory_is_linear_in_the_rows() -> None:
    """No product of the stream's length and the number of branches, and no square: second differences vanish."""
    base, longer, longest = kept(64, 2, 2), kept(128, 2, 2), kept(192, 2, 2)
    more, most, both = kept(64, 4, 2), kept(64, 6, 2), kept(128, 4, 2)
    assert longest - longer == longer - base > 0
    # masks of a branch's few own rows, and of where each starts, are kept once
    assert most - more == more - base > 0
    assert both - longer == more - base and kept(64, 2, 4) - base == more - base
    stream = 2 * 64 * 8 * (4 + 4 + 2 + 2 + 0.5) * 8  # q, outputs, k, v, log-sum-exp of the heads
    assert longer - base == stream
