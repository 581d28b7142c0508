"""The delta rule: fast paths, their states and gradients against the recurrence; convolution and normalisation."""

import importlib.util
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import megatron_refine.kernels.delta_rule as dispatcher
from megatron_refine import extras
from megatron_refine.config import ConfigError
from megatron_refine.kernels.delta_rule import delta_rule, fla, l2_normalize, packed_delta_rule
from megatron_refine.kernels.delta_rule.chunk import chunk_delta_rule
from megatron_refine.kernels.delta_rule.reference import recurrent_delta_rule
from megatron_refine.kernels.places import Places
from megatron_refine.kernels.short_conv import short_conv
from megatron_refine.platform import hardware
from tests import fla_parts

HEADS, KEY, VALUE = 2, 6, 5
# fp64 rounds at 1e-16; a few thousand dependent roundings stay far below
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
Inputs = dict[str, Tensor]


def make_inputs(
    size: int, length: int, gated: bool, states: int = 0, key: int = KEY, value: int = VALUE, decay: float = 0.3,
    groups: int = HEADS,
) -> Inputs:  # fmt: skip
    """fp64 leaves: q, k (unit length) of `groups` heads, v, beta in (0, 1), g <= 0 if gated, `states` start states."""
    generator = torch.Generator().manual_seed(1000 * size + length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows, shared = (size, length, HEADS), (size, length, groups, key)
    x = {"q": normal(*shared), "k": F.normalize(normal(*shared), dim=-1), "v": normal(*rows, value)}
    x["beta"] = normal(*rows).sigmoid()
    if gated:
        x["g"] = -decay * normal(*rows).abs()
    if states:
        x["state"] = normal(states, HEADS, key, value)
    return {name: value.requires_grad_() for name, value in x.items()}


def recurrent(x: Inputs, shared: int = 1) -> tuple[Tensor, Tensor]:
    """Outputs [N, T, H, V] and all T+1 states [N, T+1, H, K, V] of the recurrence."""
    whole = {name: x[name].repeat_interleave(HEADS // x[name].shape[2], 2) for name in ("q", "k")}
    if "state" in x:
        whole["state"] = x["state"].repeat_interleave(shared, 0)
    o, states = recurrent_delta_rule(**(x | whole))
    return o, torch.stack(states, 1)


def gradients(values: list[Tensor], x: Inputs) -> Inputs:
    """Gradients of a fixed random weighting of `values` with respect to every input."""
    generator = torch.Generator().manual_seed(9)
    weights = [torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v) for v in values]
    loss = torch.stack([(v * w).sum() for v, w in zip(values, weights, strict=True)]).sum()
    return dict(zip(x, torch.autograd.grad(loss, list(x.values()), materialize_grads=True), strict=True))


def assert_same(found: list[Tensor], expected: list[Tensor], x: Inputs) -> None:
    """Values and the gradients of every input; a failure names the input."""
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, **EXACT)
    torch.testing.assert_close(gradients(found, x), gradients(expected, x), **EXACT)


@pytest.mark.parametrize("gated", [False, True])
def test_reference_is_an_associative_memory(gated: bool) -> None:
    keys = torch.linalg.qr(torch.randn(KEY, KEY, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    order = [0, 1, 2, 1]  # the second write to key 1 replaces the first
    k, v = keys[order][None, :, None], torch.arange(8.0, dtype=torch.float64).view(1, 4, 1, 2) + 1
    g = torch.full((1, 4, 1), -0.5, dtype=torch.float64) if gated else None
    o, states = recurrent_delta_rule(k, k, v, torch.ones_like(v[..., 0]), g)
    torch.testing.assert_close(o, v * KEY**-0.5, **EXACT)  # each token reads back what it wrote
    kept = [math.exp(-0.5 * age) if gated else 1.0 for age in (3, 0, 1)]
    for key, row, factor in zip((0, 1, 2), (0, 3, 2), kept, strict=True):
        torch.testing.assert_close(keys[key] @ states[-1][0, 0], v[0, row, 0] * factor, **EXACT)


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("length", [1, 5, 63, 64, 65, 130, 200])
def test_chunks_equal_the_recurrence(length: int, gated: bool, start: bool) -> None:
    x = make_inputs(2, length, gated, states=2 if start else 0)
    o, final, _ = delta_rule(**x)
    truth, states = recurrent(x)
    assert_same([o, final], [truth, states[:, -1]], x)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("length", [1, 5, 65])
def test_start_states_shared_by_branches(length: int, gated: bool) -> None:
    x = make_inputs(6, length, gated, states=2)
    o, final, _ = delta_rule(**x)
    truth, states = recurrent(x, shared=3)
    assert_same([o, final], [truth, states[:, -1]], x)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("length", [5, 64, 130])
def test_state_at_any_position_is_in_the_graph(length: int, gated: bool) -> None:
    x = make_inputs(2, length, gated, states=2)
    rows, at = positions(length)
    o, _, trace = delta_rule(**x)
    truth, states = recurrent(x)
    assert_same([o, trace.state_at(Places.read(rows, at))], [truth, states[rows, at]], x)


def positions(length: int) -> tuple[Tensor, Tensor]:
    """Sequences and positions in two sequences: around the ends of chunks, and at both ends."""
    at = [p for p in (0, 1, 63, 64, 65, 128, length) if p <= length]
    return torch.arange(2).repeat_interleave(len(at)), torch.tensor(at * 2)


def test_trace_of_shared_start_states() -> None:
    x = make_inputs(6, 70, True, states=2)
    rows, at = torch.arange(6), torch.tensor([0, 3, 0, 64, 1, 70])
    _, states = recurrent(x, shared=3)
    assert_same([delta_rule(**x)[2].state_at(Places.read(rows, at))], [states[rows, at]], x)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("length", [1, 70])
def test_keys_shared_by_heads(length: int, gated: bool) -> None:
    x = make_inputs(2, length, gated, states=2, groups=1)
    rows, at = positions(length)
    o, final, trace = delta_rule(**x)
    truth, states = recurrent(x)
    assert_same([o, final, trace.state_at(Places.read(rows, at))], [truth, states[:, -1], states[rows, at]], x)


PACKED = [70, 1, 3, 64, 1, 128, 3, 101]  # tokens of sequences end to end


@pytest.mark.parametrize("gated", [False, True])
def test_packed_sequences_equal_each_alone(gated: bool) -> None:
    """From states of their own, and no row is computed besides theirs and the rest of a last chunk of 64."""
    x = make_inputs(1, sum(PACKED), gated, states=len(PACKED))
    packed = {name: value.detach() for name, value in x.items()}
    computed: list[int] = []

    def counting(q: Tensor, *rest: Any) -> Any:
        computed.append(q.shape[0] * q.shape[1])
        return chunk_delta_rule(q, *rest)

    with mock.patch("megatron_refine.kernels.delta_rule.chunk_delta_rule", counting):
        o, finals = packed_delta_rule(**({"g": None} | packed), lengths=PACKED)
    assert sorted(computed) == [1 + 1, 3 + 3, 64, 128 + 128 + 128]
    rows = {name: value.split(PACKED, 1) for name, value in packed.items() if name != "state"}
    for i, (own, final) in enumerate(zip(o.split(PACKED, 1), finals, strict=True)):
        mine = {name: parts[i] for name, parts in rows.items()}
        truth, state, _ = chunk_delta_rule(**mine, state=packed["state"][i : i + 1])
        torch.testing.assert_close(own, truth, rtol=0, atol=1e-12)
        torch.testing.assert_close(final[None], state, rtol=0, atol=1e-12)


def test_no_decay_is_the_plain_rule() -> None:
    x = make_inputs(2, 70, False, states=2)
    gated = delta_rule(**x, g=torch.zeros(2, 70, HEADS, dtype=torch.float64))
    assert_same(list(gated[:2]), list(delta_rule(**x)[:2]), x)


@pytest.mark.parametrize("decay", [5.0, 50.0])  # over a chunk e^-250, and e^-2500, which is 0 in fp64
def test_strong_decay(decay: float) -> None:
    x = make_inputs(2, 70, True, states=2, decay=decay)
    rows, at = torch.tensor([0, 1, 1]), torch.tensor([40, 64, 70])
    o, final, trace = delta_rule(**x)
    truth, states = recurrent(x)
    found = [o, final, trace.state_at(Places.read(rows, at))]
    assert_same(found, [truth, states[:, -1], states[rows, at]], x)


@pytest.mark.parametrize("gated", [False, True])
def test_single_precision(gated: bool) -> None:
    x = make_inputs(2, 200, gated, states=2, key=32, value=32)
    low = {name: value.detach().float().requires_grad_() for name, value in x.items()}
    found, truth = delta_rule(**low), delta_rule(**x)
    theirs, ours = gradients(list(truth[:2]), x), gradients(list(found[:2]), low)
    pairs = [*zip(found[:2], truth[:2], strict=True), *((ours[n], theirs[n]) for n in x)]
    # fp32 rounds at 6e-8 and errors grow like the root of a few hundred additions (measured 5e-7); one product in bf16
    # or TF32 would give 1e-3
    assert max(relative(f, e) for f, e in pairs) < 5e-6


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
def test_half_precision_is_computed_in_single(state: torch.dtype) -> None:
    x = {name: value.detach().bfloat16() for name, value in make_inputs(2, 70, True, states=2).items()}
    x["state"] = x["state"].to(state)
    found, upcast = delta_rule(**x), delta_rule(**{name: value.float() for name, value in x.items()})
    assert found[0].dtype == found[1].dtype == torch.float32
    assert torch.equal(found[0], upcast[0]) and torch.equal(found[1], upcast[1])


@pytest.fixture
def fla_path(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What calls fla's parts, with parts in torch in their place: `make test-kernels` runs the real ones."""
    monkeypatch.setattr(fla, "_parts", fla_parts.parts)
    return fla.fla_delta_rule


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("length", [5, 64, 70, 200])
def test_fla_path_equals_the_recurrence(length: int, grouped: bool, gated: bool, fla_path: Callable[..., Any]) -> None:
    """States are read twice: of all chunks, two places in one, and of the second sequence alone."""
    x = make_inputs(2, length, gated, states=1, groups=1 if grouped else HEADS)
    rows, at = positions(length)
    o, final, trace = fla_path(**x)
    truth, states = recurrent(x, shared=2)
    found = [o, final, trace.state_at(Places.read(rows, at)), trace.state_at(Places.read(rows[-3:], at[-3:]))]
    assert_same(found, [truth, states[:, -1], states[rows, at], states[rows[-3:], at[-3:]]], x)


def test_fla_path_without_all_of_its_gradients(fla_path: Callable[..., Any]) -> None:
    """Where a loss knows nothing of the outputs, or of the states, or where there is no graph."""
    x, places = make_inputs(2, 130, True), Places.read(torch.tensor([0, 1]), torch.tensor([100, 130]))
    found = fla_path(**x)[2].state_at(places)
    assert_same([found], [recurrent(x)[1][[0, 1], [100, 130]]], x)
    o, _, trace = fla_path(**x)
    trace.state_at(places)  # in no loss
    assert_same([o], [recurrent(x)[0]], x)
    with torch.no_grad():
        torch.testing.assert_close(fla_path(**x)[2].state_at(places), found, **EXACT)


def test_fla_path_twice_backward(fla_path: Callable[..., Any]) -> None:
    """What was read the first time is not added to the second."""
    x = make_inputs(1, 130, True)
    found = fla_path(**x)[2].state_at(Places.read(torch.tensor([0]), torch.tensor([100])))
    once, again = (torch.autograd.grad(found.sum(), x["k"], retain_graph=keep)[0] for keep in (True, False))
    assert once.equal(again)


@pytest.mark.parametrize("gated", [False, True])
def test_fla_path_asks_the_device_for_nothing(gated: bool, fla_path: Callable[..., Any]) -> None:
    """Tensors without values: whoever looks at one ends here."""
    x = make_inputs(2, 130, gated)
    rows, at = positions(130)
    places = Places.read(rows, at)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {name: mode.from_tensor(value.detach()).requires_grad_() for name, value in x.items()}
        there = Places(mode.from_tensor(rows), mode.from_tensor(at), places.on_host)
        for path in (fla_path, delta_rule):
            o, final, trace = path(**fake)
            state = trace.state_at(there)
            (o.sum() + final.sum() + state.sum()).backward()
    assert state.shape == (len(at), HEADS, KEY, VALUE) and fake["k"].grad.shape == x["k"].shape


@pytest.fixture
def on_gpu() -> dict[str, Any]:
    """Arguments that pretend to be bf16 tensors on a GPU."""
    tensor = SimpleNamespace(device=SimpleNamespace(type="cuda"), dtype=torch.bfloat16)
    return dict.fromkeys(("q", "k", "v", "beta"), tensor)


def test_gpu_without_fla_is_loud(on_gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    dispatcher._require_fla.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"flash-linear-attention is not installed.*pip install"):
        delta_rule(**on_gpu)


def test_gpu_with_fla_takes_its_kernels(on_gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    dispatcher._require_fla.cache_clear()
    monkeypatch.setattr(extras, "check_fla", lambda: None)
    monkeypatch.setattr(fla, "fla_delta_rule", lambda *args: "kernels")
    assert delta_rule(**on_gpu) == "kernels"
    dispatcher._require_fla.cache_clear()  # what was found here is not there


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gated", [False, True])
def test_triton_kernels_equal_torch(gated: bool, dtype: torch.dtype) -> None:
    pytest.importorskip("fla", reason="needs flash-linear-attention")
    x = make_inputs(4, 1100, gated, states=2, key=64, value=64, decay=0.05)
    device = hardware.device()
    low = {n: v.detach().to(device, torch.float32 if n in ("state", "g") else dtype) for n, v in x.items()}
    low = {n: v.requires_grad_() for n, v in low.items()}
    rows, at = torch.tensor([1, 3, 2], device=device), torch.tensor([600, 1024, 1100], device=device)
    results = []
    for path in (delta_rule, chunk_delta_rule):
        o, final, trace = path(**low)
        values = [o, final, trace.state_at(Places.read(rows, at))]
        results.append([*values, *gradients([v.float() for v in values], low).values()])
    # the kernels multiply in bf16, which rounds at 4e-3, whatever the inputs are
    assert max(relative(f, e) for f, e in zip(*results, strict=True)) < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("length", [1, 5])
def test_decoding_on_triton_kernels_equals_torch(length: int, gated: bool) -> None:
    """Without gradients few tokens take the recurrent kernel."""
    pytest.importorskip("fla", reason="needs flash-linear-attention")
    x = make_inputs(4, length, gated, states=2, key=64, value=64, decay=0.05)
    own = {n: v.detach().to(hardware.device(), torch.float32) for n, v in x.items()}
    with torch.no_grad():
        found, expected = delta_rule(**own), chunk_delta_rule(**own)
    assert max(relative(f, e) for f, e in zip(found[:2], expected[:2], strict=True)) < 2e-2  # inputs in bf16


@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("with_tail", [False, True])
def test_short_conv_is_torchs_causal_convolution(with_tail: bool, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    shape = {"x": (2, length, 3, 4), "weight": (3, 4, 4), "tail": (2, 3, 3, 4)}
    x = {n: torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for n, s in shape.items()}
    tail = x["tail"] if with_tail else torch.zeros_like(x["tail"])
    rows = torch.cat([tail, x["x"]], 1).flatten(2).mT  # [N, D, W-1+T]
    truth = F.silu(F.conv1d(rows, x["weight"].view(12, 1, 4), groups=12)).mT.unflatten(-1, (3, 4))
    inputs = x if with_tail else {n: x[n] for n in ("x", "weight")}
    assert_same([short_conv(**inputs)], [truth], inputs)


def test_l2_normalize() -> None:
    x = torch.randn(3, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert_same([l2_normalize(x)], [x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()], {"x": x})
    zero = torch.zeros(2, 7, requires_grad=True)
    assert not l2_normalize(zero).any()
    assert gradients([l2_normalize(zero)], {"x": zero})["x"].isfinite().all()
    low = x.detach().bfloat16()
    assert torch.equal(l2_normalize(low), l2_normalize(low.float())) and l2_normalize(low).dtype == torch.float32
