"""fla's Triton kernels, in Triton's interpreter on the CPU and in fp16, against the recurrence and the torch path.

`make test-kernels`. A GPU runs the same code compiled, in bf16: `make test-gpu`.
"""

import itertools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_refine.config import Config
from megatron_refine.kernels.delta_rule.chunk import chunk_delta_rule
from megatron_refine.kernels.delta_rule.fla import fla_packed
from megatron_refine.kernels.places import Places
from tests import interpreter
from tests.parity import batch, full_gradients, relative, small_config
from tests.test_delta_rule import HEADS, Inputs, gradients, make_inputs, recurrent
from tests.test_delta_rule import relative as difference
from tests.zygote import Zygote

pytestmark = [pytest.mark.kernels, pytest.mark.filterwarnings("ignore:Triton is not supported on current platform")]
ROUNDING = 3e-3  # fp16 rounds at 5e-4, inputs and states between chunks alike
SIZE = 16  # of keys and values: tl.dot takes no less


@pytest.fixture(autouse=True)
def interpreted() -> None:
    interpreter.prepare()


def half_inputs(size: int, length: int, gated: bool, states: int, grouped: bool) -> tuple[Inputs, Inputs]:
    """In fp64, and as the kernels take them: the same numbers."""
    x = make_inputs(size, length, gated, states, SIZE, SIZE, decay=0.1, groups=1 if grouped else HEADS)
    single = ("g", "state")
    low = {n: v.detach().to(torch.float32 if n in single else torch.float16).requires_grad_() for n, v in x.items()}
    return {n: v.detach().double().requires_grad_() for n, v in low.items()}, low


def values(path: Any, x: Inputs, places: Places) -> list[Tensor]:
    """Outputs, final state, states at the places, and the gradients of every input."""
    o, final, trace = path(**x)
    found = [o, final, trace.state_at(places)]
    return [*found, *gradients(found, x).values()]


def expected(x: Inputs, places: Places, shared: int) -> list[Tensor]:
    """The same of the recurrence."""
    o, states = recurrent(x, shared)
    found = [o, states[:, -1], states[places.sequences, places.tokens]]
    return [*found, *gradients(found, x).values()]


CASES = {
    # sequences, tokens, start states, places
    "one chunk": (2, 5, 0, [(0, 0), (1, 3), (1, 5)]),
    "three chunks": (1, 150, 0, [(0, 1), (0, 64), (0, 70), (0, 100), (0, 150)]),
    "start states": (2, 70, 1, [(0, 33), (1, 64), (1, 70)]),
    "branches": (4, 3, 2, [(0, 2), (3, 3)]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_kernels_equal_the_recurrence_and_torch(case: str, gated: bool, grouped: bool) -> None:
    size, length, states, where = CASES[case]
    x, low = half_inputs(size, length, gated, states, grouped)
    places = Places.read(*torch.tensor(where).unbind(1))
    found = values(interpreter.delta_rule, low, places)
    exact, torch_path = expected(x, places, size // max(states, 1)), values(chunk_delta_rule, low, places)
    names = ["o", "final", "states", *x]
    for name, mine, truth, theirs in zip(names, found, exact, torch_path, strict=True):
        assert difference(mine, truth) < ROUNDING, name
        assert difference(mine, theirs) < ROUNDING, name


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("length", [1, 4])
def test_decoding_equals_the_recurrence(length: int, gated: bool) -> None:
    """The recurrent kernel: few tokens that continue states, without gradient; keys shared by heads."""
    x, low = half_inputs(4, length, gated, states=2, grouped=True)
    with torch.no_grad():
        o, final, _ = interpreter.delta_rule(**low)
        truth, states = recurrent(x, shared=2)
    assert difference(o, truth) < ROUNDING and difference(final, states[:, -1]) < ROUNDING


@pytest.mark.parametrize("gated", [False, True])
def test_packed_sequences_equal_the_recurrence(gated: bool) -> None:
    """Parts of prompts end to end, as SGLang hands them on, each from a state of its own; keys shared by heads."""
    lengths = [70, 1, 5]
    x, low = half_inputs(1, sum(lengths), gated, states=len(lengths), grouped=True)
    with torch.no_grad():
        o, finals = fla_packed(**({"g": None} | low), lengths=lengths)
        rows = {name: value.split(lengths, 1) for name, value in x.items() if name != "state"}
        for i, (own, final) in enumerate(zip(o.split(lengths, 1), finals, strict=True)):
            mine = {name: parts[i] for name, parts in rows.items()} | {"state": x["state"][i : i + 1]}
            truth, states = recurrent(mine, shared=1)
            assert difference(own, truth) < ROUNDING and difference(final[None], states[:, -1]) < ROUNDING


SMALL = ["model.hidden_size=32", "model.intermediate_size=48", "data.seq_length=96", "train.global_batch_size=2"]
SMALL += ["refine.num_chunks=2", "refine.num_rollouts=2", "refine.rollout_len=3"]
FAMILIES = {
    "delta_net": ["model.num_heads=2"],
    "gated_delta_net": ["model.num_heads=1", "model.head_dim=16", "model.num_v_heads=2", "model.expand_v=1.0"],
}
KINDS = {"ntp": ("fused", False), "fused": ("fused", True), "two-pass": ("two_pass", True)}


def steps(config: Config, refine: bool) -> list[Any]:
    """On a rank: metrics, draws and every gradient of a step on the torch path, then on fla's kernels."""
    from megatron_refine.models.mixers.delta import mixer as delta
    from tests.test_step import make_step

    found = []
    for path in (delta.delta_rule, interpreter.delta_rule):
        with mock.patch.object(delta, "delta_rule", side_effect=path) as rule:
            step = make_step(config, torch.float32)
            metrics = step(batch(2, 96), 0, refine=refine)
            drawn = step.last.experience if refine else None
            found.append((metrics, drawn and (drawn.positions, drawn.tokens), full_gradients(step.model)))
        assert rule.called
    return found


@pytest.mark.parametrize(("model", "kind"), itertools.product(FAMILIES, KINDS))
def test_steps_equal_those_of_the_torch_path(ranks: Zygote, tmp_path: Path, model: str, kind: str) -> None:
    mode, refine = KINDS[kind]
    config = small_config(tmp_path, f"update.mode={mode}", *SMALL, *FAMILIES[model], model=model)
    (metrics, drawn, theirs), (found, own, mine) = ranks(1, steps, config=config, refine=refine)[0]
    if refine:
        assert all(a.equal(b) for a, b in zip(drawn, own, strict=True))  # else the steps are of other rollouts
    losses = [name for name in metrics if "loss" in name or name == "rollout/reward_mean"]
    for name in losses:
        assert found[name] == pytest.approx(metrics[name], rel=ROUNDING, abs=1e-4), name
    errors = relative(mine, theirs)
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] < 1e-2, (worst, errors[worst])  # its terms cancel: at most 5.5e-3, of a decay's parameters
