"""LaCT: the fast weights against their recurrence, the window attention against the whole matrix, long decoding."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megatron_refine.config import Config, ConfigError, load
from megatron_refine.kernels.lact import Rule, Tokens, chunk_lact, stacked
from megatron_refine.kernels.lact.reference import recurrent_lact
from megatron_refine.kernels.places import Places
from megatron_refine.kernels.window_attention import branch_attention, window_attention
from megatron_refine.kernels.window_attention.gpu import flex_window_attention
from megatron_refine.kernels.window_attention.reference import full_window_attention
from megatron_refine.models.family import FAMILIES
from megatron_refine.models.lact.config import LactConfig
from megatron_refine.models.lact.cost import LactCost
from megatron_refine.platform import hardware
from tests.lanes import short
from tests.parity import batch, build, small_config

# fp64 rounds at 1e-16; Newton-Schulz multiplies small singular values, and their rounding, by up to 500
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
HEADS, DIM = 2, 6


def fast_inputs(length: int, inner: int) -> dict[str, Tensor]:
    """fp64 leaves of two sequences; rates large enough for the weights to move."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = {name: normal(2, length, HEADS, DIM) for name in ("q", "k", "v")}
    x |= {"rates": 0.3 * normal(2, length, HEADS, 3).abs(), "momentum": normal(2, length, HEADS).sigmoid()}
    x |= {"w0": normal(HEADS, inner, DIM), "w1": normal(HEADS, DIM, inner), "w2": normal(HEADS, inner, DIM)}
    return {name: value.requires_grad_() for name, value in x.items()}


@pytest.mark.parametrize("rule", [Rule(8), Rule(8, muon=True), Rule(8, prenorm=True), Rule(8, muon=True, prenorm=True)])
@pytest.mark.parametrize("inner", [6, 9])
@pytest.mark.parametrize("length", [5, 8, 21, 24])
@pytest.mark.parametrize("with_momentum", [True, False])
def test_chunks_equal_the_recurrence(rule: Rule, inner: int, length: int, with_momentum: bool) -> None:
    x = fast_inputs(length, inner)
    momentum = x["momentum"] if with_momentum else None
    initial = (x["w0"], x["w1"], x["w2"])
    found, weights, _ = chunk_lact(stacked(*initial), x["q"], Tokens.of(x["k"], x["v"], x["rates"], momentum), rule)
    each = [(x["q"][i], x["k"][i], x["v"][i], x["rates"][i], None if momentum is None else momentum[i]) for i in (0, 1)]
    rows = [recurrent_lact(initial, *sequence, rule) for sequence in each]
    expected = torch.stack(rows)
    torch.testing.assert_close(found, expected, **EXACT)
    assert len(weights) == -(-length // 8)
    if length > 8:
        moved = (weights[1].used - weights[0].used).norm() / weights[0].used.norm()
        assert moved > 0.05  # else the comparison would not see an update
    weighting = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = [
        torch.autograd.grad((o * weighting).sum(), list(x.values()), allow_unused=True) for o in (found, expected)
    ]
    for name, mine, theirs in zip(x, *gradients, strict=True):
        if mine is None:
            mine = torch.zeros_like(x[name])
        torch.testing.assert_close(mine, torch.zeros_like(mine) if theirs is None else theirs, **EXACT)


def test_a_token_without_rates_leaves_no_trace() -> None:
    x = {name: value.detach() for name, value in fast_inputs(16, 6).items()}
    initial = stacked(x["w0"], x["w1"], x["w2"])
    rates = x["rates"].clone()
    rates[:, 3] = 0
    other = x["k"].clone()
    other[:, 3] = 7.0
    first, second = (
        chunk_lact(initial, x["q"], Tokens.of(k, x["v"], rates, None), Rule(8))[0] for k in (x["k"], other)
    )  # fmt: skip
    assert first.equal(second)


def attention_inputs(length: int, count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(count, length, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)
    ]


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 37])
def test_window_attention_equals_the_whole_matrix(length: int) -> None:
    inputs = attention_inputs(length)
    found, expected = window_attention(*inputs, window=8), full_window_attention(*inputs, window=8)
    torch.testing.assert_close(found, expected, **EXACT)
    weighting = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = [torch.autograd.grad((o * weighting).sum(), inputs) for o in (found, expected)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("length", "window"), [(9, 8), (37, 8), (300, 130)])  # the last: blocks that are skipped
def test_flex_attention_sees_the_same_window(length: int, window: int) -> None:
    """What a GPU compiles, by torch's own slow way, which has no gradients on a CPU."""
    inputs = [x.detach() for x in attention_inputs(length)]
    found = flex_window_attention(*inputs, window=window)
    torch.testing.assert_close(found, full_window_attention(*inputs, window=window), **EXACT)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_window_attention_on_a_gpu(dtype: torch.dtype) -> None:
    """flash-attn where it is installed, FlexAttention else: outputs and gradients of the matrix in fp64."""
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(2, 700, 4, 64, generator=generator).to(dtype).double().requires_grad_() for _ in range(3)]
    own = [x.detach().to(hardware.device(), dtype).requires_grad_() for x in whole]
    found, expected = window_attention(*own, window=256), full_window_attention(*whole, window=256)
    weighting = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    theirs = [expected, *torch.autograd.grad((expected * weighting).sum(), whole)]
    mine = [found, *torch.autograd.grad((found * weighting.to(found)).sum(), own)]
    bound = 2e-2 if dtype == torch.bfloat16 else 5e-3  # rounding of bf16; products in TF32
    for a, b in zip(mine, theirs, strict=True):
        assert (a.double().cpu() - b).norm() < bound * b.norm()


@pytest.mark.parametrize(("rows", "earlier"), [(5, 0), (5, 2), (12, 0), (12, 4)])
def test_branch_attention_equals_the_whole_matrix(rows: int, earlier: int) -> None:
    """Two branches each from positions 3 and 20 of one sequence, of which the last rows are asked; also where a branch
    is longer than the window."""
    window = 8
    q, k, v = attention_inputs(24, count=1)
    own_q, own_k, own_v = attention_inputs(rows, count=4)
    positions, expected = torch.tensor([3, 20]), []
    for branch in range(4):
        p = int(positions[branch // 2])
        whole = [
            torch.cat([x[:, :p], y[branch : branch + 1]], 1)
            for x, y in ((q, own_q), (k, own_k), (v, own_v))
        ]  # fmt: skip
        expected.append(full_window_attention(*whole, window=window)[0, p + earlier :])
    index = (positions[:, None] + torch.arange(1 - window, 0)).clamp(min=0)
    found = branch_attention(own_q[:, earlier:], (k[0, index], v[0, index]), (own_k, own_v), positions, window)
    torch.testing.assert_close(found, torch.stack(expected), **EXACT)
    inputs = [k, v, own_q, own_k, own_v]
    gradients = [torch.autograd.grad(o.square().sum(), inputs) for o in (found, torch.stack(expected))]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


def decoded(config: Config, steps: int) -> tuple[float, list[int]]:
    """On a rank: hidden rows of `steps` tokens decoded one by one from three positions, against one whole forward."""
    from megatron_refine.models.layout import Branches
    from megatron_refine.trainer import forward
    from megatron_refine.trainer.forward import _rows

    model, _ = build(config, torch.float64)
    tokens, starts = batch(1).tokens, torch.tensor([1, 30, 64])
    with torch.no_grad():
        whole = _rows(model, tokens, Branches(main_len=192)).local[:, 0]
        states: dict[int, Any] = forward.main_pass(model, tokens).states(Places.read(torch.zeros_like(starts), starts))
        worst = 0.0
        for j in range(steps):
            rows, states = forward.decode_step(model, tokens[0, starts + j], states)
            worst = max(worst, float((rows.local[:, 0] - whole[starts + j]).abs().max()))
    state = states[1]
    kept = [len(state.own), state.window[0].shape[1], state.prefix[0].shape[1], len(state.weights)]
    return worst, kept


@pytest.mark.parametrize(
    ("model", "tp"),
    short(
        itertools.product(["lact", "lact muon", "lact variant"], [1, 2]),
        lambda model, tp: (model, tp) != ("lact muon", 2),
    ),
)
def test_decoding_past_chunks_and_window_equals_the_forward(ranks: Any, tmp_path: Path, model: str, tp: int) -> None:
    config = small_config(tmp_path, f"parallel.tp={tp}", model=model)
    for worst, kept in ranks(tp, decoded, config=config, steps=100):
        assert worst < 1e-10
        own, window, prefix, weights = kept
        assert own <= config.model.lact_chunk_size  # type: ignore[attr-defined]
        assert window == config.model.window_size - 1 and prefix == 0 and weights <= 3  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.num_attn_heads=6", "must be a multiple of model.num_lact_heads=4"),
        ("model.num_attn_heads=64", "its double must divide model.hidden_size=64"),
        ("model.num_lact_heads=3", "must divide model.hidden_size=64"),
        ("parallel.tp=8", "must divide the 4 heads of the model; choose one of 1, 2, 4"),
    ],
)
def test_heads_that_do_not_fit(tmp_path: Path, override: str, says: str) -> None:
    small_config(tmp_path, model="lact")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "small.yaml", [override], FAMILIES)
    assert says in str(caught.value)


@pytest.mark.parametrize("muon", [False, True])
def test_fast_weight_flops_equal_those_torch_counts(muon: bool) -> None:
    sizes = {"vocab_size": 128, "hidden_size": 96, "num_layers": 1, "intermediate_size": 96, "num_attn_heads": 4}
    shape = {"num_lact_heads": 2, "inter_multi": 1.5, "lact_chunk_size": 32, "use_muon": muon}
    model = LactConfig.model_validate({"family": "lact"} | sizes | shape)
    length, rows = 128, (1, 128, 2)
    q, k, v = (torch.randn(*rows, 48) for _ in range(3))
    initial = stacked(torch.randn(2, 72, 48), torch.randn(2, 48, 72), torch.randn(2, 72, 48))
    with FlopCounterMode(display=False) as counter:
        chunk_lact(initial, q, Tokens.of(k, v, torch.rand(*rows, 3), torch.rand(*rows)), Rule(32, muon=muon))
    matmuls = LactCost(model).flops(length)
    counted = sum(matmuls[name] for name in ("read", "update", "muon"))
    assert counter.get_total_flops() == pytest.approx(length * counted, rel=1e-3)  # a token's share is rounded
