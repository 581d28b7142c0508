"""LaCT's updates, whose backward pass is written by hand, against numerical differences and autograd; launches."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_refine.kernels.lact import Rule, Tokens, after, chunk_lact, passes, read, stacked, start
from megatron_refine.kernels.lact.muon import NEWTON_SCHULZ, iterations, newton_schulz, newton_schulz_backward
from megatron_refine.kernels.lact.update import updates

VIEWS = {"view", "_unsafe_view", "t", "transpose", "expand", "detach", "slice", "select", "unsqueeze", "alias", "split",
         "split_with_sizes", "unbind", "_reshape_alias", "as_strided", "empty", "empty_like", "new_empty"}  # fmt: skip


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Launches(TorchDispatchMode):
    """Counts operators that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name not in VIEWS:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def plain(x: Tensor) -> Tensor:
    """The iterations as they are written."""
    for a, b, c in NEWTON_SCHULZ:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def test_newton_schulz_and_its_backward_pass_equal_autograd() -> None:
    """Six matrices, in two parts as two chunks leave them."""
    x = normal(6, 5, 8)
    x = (x / x.norm(dim=(-2, -1), keepdim=True)).requires_grad_()
    weighting = normal(6, 5, 8, seed=1)
    expected = plain(x)
    (into,) = torch.autograd.grad((expected * weighting).sum(), x)
    with torch.no_grad():
        torch.testing.assert_close(newton_schulz(x), expected.detach(), rtol=1e-12, atol=1e-12)
        kept = iterations(list(x.split(3)))
        parts = [newton_schulz_backward([k.rows(rows) for k in kept], weighting[rows])
                 for rows in (slice(0, 3), slice(3, 6))]  # fmt: skip
    torch.testing.assert_close(torch.cat(parts), into, rtol=1e-10, atol=1e-10)  # small singular values grow 500 times


def test_launches_of_muon() -> None:
    """Forward and backward of a stack: the target is 64."""
    x = normal(6, 8, 8)
    x = x / x.norm(dim=(-2, -1), keepdim=True)
    with Launches() as forward:
        newton_schulz(x)
    with Launches() as backward:
        newton_schulz_backward(iterations([x]), x)
    products = sum(n for name, n in backward.found.items() if name in ("bmm", "baddbmm"))
    assert sum(forward.found.values()) == 15 and products == 14 + 15
    assert sum(forward.found.values()) + sum(backward.found.values()) <= 64, backward.found


HEADS, DIM, CHUNK = 2, 3, 4


def given(inner: int, momentum: bool) -> dict[str, Tensor]:
    """Of two sequences: states, tokens of two chunks and a half, the initial weights; all leaves."""
    shape, length = (2, HEADS, 3, inner, DIM), 5 * CHUNK // 2
    x = {name: normal(*shape, seed=i) for i, name in enumerate(("used", "total", "moved"))}
    x["initial"] = normal(HEADS, 3, inner, DIM, seed=3)
    x["x"], x["rates"] = normal(2, HEADS, 3, length, DIM, seed=4), 0.3 * normal(2, HEADS, length, 3, seed=5).abs()
    if momentum:
        x["momentum"] = normal(2, HEADS, 2, seed=6).sigmoid()
    return {name: value.requires_grad_() for name, value in x.items()}


@pytest.mark.parametrize("rule", [Rule(CHUNK), Rule(CHUNK, prenorm=True), Rule(CHUNK, muon=True),
                                  Rule(CHUNK, muon=True, prenorm=True)])  # fmt: skip
@pytest.mark.parametrize("inner", [2, 5])
@pytest.mark.parametrize("momentum", [False, True])
def test_gradients_of_two_updates_equal_numerical_ones(rule: Rule, inner: int, momentum: bool) -> None:
    """Of every input, through every output: the weights read, those that steps are added to, and what moved."""
    x = given(inner, momentum)

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        own = dict(zip(x, values, strict=True))
        found = updates(
            rule, 2, own["used"], own["total"], own["moved"], passes.row_lengths(own["initial"]), own["x"],
            own["rates"], own.get("momentum"),
        )  # fmt: skip
        return tuple(tensor for each in found for tensor in each)

    assert torch.autograd.gradcheck(run, tuple(x.values()), atol=1e-5, rtol=1e-4, eps=1e-6, fast_mode=True)


def test_weights_that_nothing_was_asked_of() -> None:
    """A gradient through one output of the first update alone."""
    x = given(5, momentum=True)
    found = updates(
        Rule(CHUNK, muon=True), 2, x["used"], x["total"], x["moved"], passes.row_lengths(x["initial"]), x["x"],
        x["rates"], x["momentum"],
    )  # fmt: skip
    gradients = torch.autograd.grad(found[0][1].sum(), [x["x"], x["total"], x["moved"]])
    assert not gradients[0][:, :, :, CHUNK:].any()  # tokens of the second chunk
    assert all(g.isfinite().all() and g.any() for g in gradients)


def test_rows_of_zeros_stay_zero_and_have_finite_gradients() -> None:
    x = {name: value.detach().clone() for name, value in given(5, momentum=False).items()}
    for name in ("initial", "total"):
        x[name][..., 0, 0, :] = 0
        x[name].requires_grad_()
    rates = torch.zeros_like(x["rates"])
    found = updates(
        Rule(CHUNK), 1, x["used"], x["total"], x["moved"], passes.row_lengths(x["initial"]), x["x"], rates, None
    )
    assert not found[0][0][..., 0, 0, :].any()
    gradients = torch.autograd.grad(found[0][0].square().sum(), [x["initial"], x["total"]])
    assert all(g.isfinite().all() for g in gradients)


def test_reading_equals_the_gated_mlp() -> None:
    """Three sequences from each of two states: values and gradients."""
    w0, w1, w2 = normal(2, HEADS, 5, DIM), normal(2, HEADS, DIM, 5, seed=1), normal(2, HEADS, 5, DIM, seed=2)
    leaves = [w.requires_grad_() for w in (w0, w1, w2, normal(6, 4, HEADS, DIM, seed=3))]
    w0, w1, w2 = (w.repeat_interleave(3, 0) for w in leaves[:3])
    z = leaves[3].transpose(1, 2)
    expected = (torch.nn.functional.silu(z @ w0.mT) * (z @ w2.mT) @ w1.mT).transpose(1, 2)
    found = read(stacked(*leaves[:3]), leaves[3])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    mine, theirs = (torch.autograd.grad(o.square().sum(), leaves) for o in (found, expected))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("muon", [False, True])
def test_one_update_is_one_of_many(muon: bool) -> None:
    """What branches that cross a chunk's end do for themselves."""
    rule, initial, x = Rule(CHUNK, muon=muon), normal(HEADS, 3, 5, DIM), given(5, momentum=False)
    tokens = Tokens(x["x"], x["rates"], normal(2, HEADS, x["x"].shape[3]).sigmoid())
    _, weights, chunks = chunk_lact(initial, normal(2, x["x"].shape[3], HEADS, DIM), tokens, rule)
    once = start(initial, 2, torch.float64)
    for i, chunk in enumerate(chunks[:2]):
        once = after(once, chunk, initial, rule)
        for mine, theirs in zip(vars(once).values(), vars(weights[i + 1]).values(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("muon", [False, True])
def test_updates_on_a_gpu(muon: bool) -> None:
    """Compiled, in fp32 against fp64: outputs and the gradients of all inputs, with cuBLAS at its default precision."""
    from megatron_refine.platform import hardware

    shape, rule = (2, 96, 2), Rule(32, muon=muon)
    x = {name: normal(*shape, 64, seed=i) for i, name in enumerate("qkv")}
    x |= {"rates": 0.01 * normal(*shape, 3, seed=3).abs(), "momentum": normal(*shape, seed=4).sigmoid()}
    x["initial"] = normal(2, 3, 64, 64, seed=5) / 8
    found = []
    for device, dtype in (("cpu", torch.float64), (hardware.device(), torch.float32)):
        own = {name: value.to(device, dtype).requires_grad_() for name, value in x.items()}
        tokens = Tokens.of(own["k"], own["v"], own["rates"], own["momentum"])
        o = chunk_lact(own["initial"], own["q"], tokens, rule)[0]
        found.append([o, *torch.autograd.grad(o.square().sum(), list(own.values()))])
    for truth, mine in zip(*found, strict=True):
        assert (mine.double().cpu() - truth).norm() < 1e-2 * truth.norm()
