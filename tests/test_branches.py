"""The heart: branches forked from the main stream's states equal separate forwards of every full prefix.

Logits, log-probabilities and every parameter's gradient, in fp64 and fp32, at tp = 1, 2 and 4, sequence parallelism on
and off, with activation recomputation, for the packed pass (two-pass update) and for main + branch pass (fused update).
Branches are scored at the temperature that they were drawn at, the main stream at 1; the slow way divides its logits.
"""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_refine.config import Config
from megatron_refine.kernels.places import Places
from tests.lanes import short
from tests.parity import MODELS, batch, build, experience, full_gradients, relative, small_config

LAYOUTS = {
    "tp1": (1, []),
    "tp2": (2, ["parallel.tp=2"]),
    "tp2 sp": (2, ["parallel.tp=2", "parallel.sp=true"]),
    "tp4": (4, ["parallel.tp=4"]),
    "tp4 sp": (4, ["parallel.tp=4", "parallel.sp=true"]),
    "cp2": (2, ["parallel.cp=2"]),
    "cp4": (4, ["parallel.cp=4"]),
    "tp2 sp cp2": (4, ["parallel.tp=2", "parallel.sp=true", "parallel.cp=2"]),
    "tp2 sp selective": (
        2,
        ["parallel.tp=2", "parallel.sp=true", "train.recompute=selective", "train.recompute_modules=[mixer,mlp]"],
    ),
    "tp2 sp recompute": (2, ["parallel.tp=2", "parallel.sp=true", "train.recompute=full"]),
}


def separate(model: Any, b: Any, e: Any, temperature: float = 1.0) -> tuple[Any, Any]:
    """Log-probabilities of the main stream and of the branches, from one forward a prefix and whole logits; tp 1."""
    from megatron_refine.models.layout import Branches
    from megatron_refine.trainer import forward

    main = forward.main_pass(model, b.tokens).scores.logprobs[:, :-1]
    found = []
    for i, j, r in torch.cartesian_prod(*(torch.arange(s) for s in e.tokens.shape[:3])).tolist():
        p = int(e.positions[i, j])
        text = torch.cat([b.tokens[i, :p], e.tokens[i, j, r]])[None]
        rows = forward._rows(model, text, Branches(main_len=text.shape[1])).local[p - 1 : -1, 0]
        logprobs = (forward.unwrap(model).logits(rows) / temperature).log_softmax(-1)
        found.append(logprobs.gather(1, e.tokens[i, j, r][:, None])[:, 0])
    return main, torch.stack(found).view(e.tokens.shape)


def packed(model: Any, b: Any, e: Any, temperature: float = 1.0) -> tuple[Any, Any]:
    from megatron_refine.trainer import forward

    output = forward.packed_pass(model, b.tokens, e.tokens, Places.of_each(e.positions), temperature)
    return output.main, output.branches


def fused(model: Any, b: Any, e: Any, temperature: float = 1.0) -> tuple[Any, Any]:
    from megatron_refine.trainer import forward

    places = Places.of_each(e.positions)
    main = forward.main_pass(model, b.tokens)
    states = main.states(places)
    assert not main.handles  # they pin the pass
    branch = forward.branch_pass(model, forward.Forked(e.tokens, main.rows, places, states, temperature))
    return main.scores.logprobs[:, :-1], branch.logprobs


PASSES = {"separate": separate, "packed": packed, "fused": fused}


def run(config: Config, dtype: torch.dtype, names: list[str]) -> dict[str, Any]:
    """On a rank: log-probabilities and full gradients of each way to compute them."""
    from megatron_refine.step.objective import next_token_sums, policy_terms
    from megatron_refine.trainer.gradients import finalize_gradients

    model, _ = build(config, dtype)
    b, e, results = batch(3), experience(3, dtype), {}
    for name in names:
        model.zero_grad_buffer()
        main, branch = PASSES[name](model, b, e, TEMPERATURES[dtype])
        terms = policy_terms(branch, e.old_logprobs, e.advantages, 0.2, 0.2, 3.0)
        loss = next_token_sums(main, b.lengths)[0] / 100 + terms.loss.sum()
        (loss * config.parallel.cp).backward()  # as Megatron's schedule does: its reduction divides by dp * cp
        finalize_gradients([model])
        results[name] = main.detach(), branch.detach(), full_gradients(model)
    return results


@pytest.fixture(scope="module")
def reference(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, torch.dtype], Any]:
    """One rank, separate forwards, plain backward; by model and dtype."""

    @functools.cache
    def compute(model: str, dtype: torch.dtype) -> Any:
        config = small_config(tmp_path_factory.mktemp("reference"), model=model)
        return ranks(1, run, config=config, dtype=dtype, names=["separate"])[0]["separate"]

    return compute


# fp64: a few hundred roundings of 1e-16 each; fp32: 1e-7 each, and the same sums in another order
TOLERANCES = {torch.float64: (1e-10, 1e-10), torch.float32: (2e-5, 1e-4)}
TEMPERATURES = {torch.float64: 0.7, torch.float32: 1.0}


FAMILIES = ("delta_net", "gated_delta_net", "lact", "lact muon")
CASES = [(layout, dtype, model) for model in FAMILIES for layout in LAYOUTS for dtype in TOLERANCES]
CASES = [case for case in CASES if case[0] in ("tp1", "tp2 sp") or case[1] == torch.float64]
VARIANTS = [model for model in MODELS if model not in FAMILIES]
CASES += [(layout, torch.float64, model) for model in VARIANTS for layout in ("tp1", "tp4 sp", "cp4")]


def kept(layout: str, dtype: torch.dtype, model: str) -> bool:
    """A layout of each kind, of one family; the hardest layout of each other one, and each variant, once."""
    if dtype != torch.float64:
        return (layout, model) == ("tp1", "delta_net")
    if model == "delta_net":
        return layout in ("tp1", "tp4 sp", "cp2", "tp2 sp cp2", "tp2 sp recompute")
    return layout == ("tp1" if model in VARIANTS else "cp2" if model == "lact" else "tp2 sp")


@pytest.mark.parametrize(("layout", "dtype", "model"), short(CASES, kept))
def test_branches_equal_separate_forwards(
    ranks: Any, reference: Any, tmp_path: Path, layout: str, dtype: torch.dtype, model: str
) -> None:
    world, overrides = LAYOUTS[layout]
    config = small_config(tmp_path, *overrides, model=model)
    value_tolerance, gradient_tolerance = TOLERANCES[dtype]
    main_expected, branch_expected, gradients_expected = reference(model, dtype)
    largest = max(1.0, float(branch_expected.abs().max()))
    for result in ranks(world, run, config=config, dtype=dtype, names=["packed", "fused"]):
        for name, (main, branch, gradients) in result.items():
            assert (main - main_expected).abs().max() < value_tolerance * largest, name
            assert (branch - branch_expected).abs().max() < value_tolerance * largest, name
            errors = relative(gradients, gradients_expected)
            worst = max(errors, key=lambda key: errors[key])
            assert errors[worst] < gradient_tolerance, (name, worst, errors[worst])


def logits(config: Config) -> float:
    """On a rank: largest difference of a branch row's logits, packed against separate."""
    from megatron_refine.models.layout import Branches
    from megatron_refine.trainer.forward import _rows
    from megatron_refine.trainer.model import unwrap

    model, _ = build(config, torch.float32)
    b, e, head, worst = batch(2), experience(2, torch.float32), unwrap(model).logits, 0.0
    places = Places.of_each(e.positions)
    layout = Branches(main_len=192, num_positions=4, num_rollouts=2, branch_len=5, places=places)
    with torch.no_grad():
        packed = _rows(model, torch.cat([b.tokens, e.tokens.flatten(1)], 1), layout).local
        rows = layout.split(packed)[1].view(2, 4, 2, 5, -1)
        for i, j, r in torch.cartesian_prod(*(torch.arange(s) for s in e.tokens.shape[:3])).tolist():
            p = int(e.positions[i, j])
            text = torch.cat([b.tokens[i, :p], e.tokens[i, j, r]])[None]
            alone = head(_rows(model, text, Branches(main_len=p + 5)).local[p : p + 5, 0])[:, :30]
            worst = max(
                worst, float((head(rows[i, j, r])[:, :30] - alone).abs().max() / alone.abs().max().clamp(min=1))
            )
    return worst


@pytest.mark.parametrize(
    ("layout", "model"),
    short(
        itertools.product(("tp1", "tp2", "tp2 sp"), ("delta_net", "gated_delta_net")),
        lambda layout, model: (layout, model) in (("tp2 sp", "delta_net"), ("tp1", "gated_delta_net")),
    ),
)
def test_branch_logits_equal_separate_forwards(ranks: Any, tmp_path: Path, layout: str, model: str) -> None:
    world, overrides = LAYOUTS[layout]
    config = small_config(tmp_path, *overrides, model=model)
    assert max(ranks(world, logits, config=config)) < 2e-5  # fp32, of max(1, largest logit)


def detached(config: Config) -> tuple[str, float, int]:
    """On a rank: what the guard says of detached states, how wrong their gradients would be, and of how many tensors it
    lets one pass that is detached alone."""
    from megatron_refine.trainer import forward

    model, _ = build(config, torch.float64)
    b, e = batch(3), experience(3, torch.float64)
    message, missed = "", 0
    main = forward.main_pass(model, b.tokens)
    states = main.states(Places.read(torch.arange(3), torch.tensor([10, 70, 100])))
    everything = {layer: state.tensors() for layer, state in states.items()}
    forward._check_graph(states)
    for layer, i in [(layer, i) for layer, tensors in everything.items() for i in range(len(tensors))]:
        one = {name: list(tensors) for name, tensors in everything.items()}
        one[layer][i] = one[layer][i].detach()
        given = {name: SimpleNamespace(tensors=lambda tensors=tensors: tensors) for name, tensors in one.items()}
        try:
            forward._check_graph(given)
            missed += 1
        except AssertionError:
            pass

    def gradients(detach: bool) -> Any:
        nonlocal message
        model.zero_grad_buffer()
        main = forward.main_pass(model, b.tokens)
        places = Places.of_each(e.positions)
        states = main.states(places)
        if detach:
            states = {layer: state.detach() for layer, state in states.items()}
            try:
                forward.branch_pass(model, forward.Forked(e.tokens, main.rows, places, states))
            except AssertionError as error:
                message = str(error)
            forward._check_graph = lambda states: None
        branch = forward.branch_pass(model, forward.Forked(e.tokens, main.rows, places, states))
        (branch.logprobs * e.advantages[..., None]).sum().backward()
        return full_gradients(model)

    errors = relative(gradients(True), gradients(False))
    return message, max(errors.values()), missed


def test_detached_states_are_refused_and_would_be_wrong(ranks: Any, tmp_path: Path) -> None:
    message, error, missed = ranks(1, detached, config=small_config(tmp_path))[0]
    assert "detached" in message and not missed
    assert error > 0.1  # so the gradient tests above would see it


def without_head_norm_sum(config: Config) -> dict[str, float]:
    """On a rank: gradients with Megatron's reductions alone, against ours."""
    from megatron_refine.trainer.gradients import finalize_gradients, finalize_model_grads

    model, _ = build(config, torch.float64)
    found = []
    for finalize in (finalize_model_grads, finalize_gradients):
        model.zero_grad_buffer()
        packed(model, batch(3), experience(3, torch.float64))[0].sum().backward()
        finalize([model])
        found.append(full_gradients(model))
    return relative(*found)


@pytest.mark.parametrize("layout", ["tp2", "tp2 sp"])
def test_head_norm_gradients_need_their_own_sum(ranks: Any, tmp_path: Path, layout: str) -> None:
    world, overrides = LAYOUTS[layout]
    errors = ranks(world, without_head_norm_sum, config=small_config(tmp_path, *overrides))[0]
    for name, error in errors.items():
        assert (error > 0.1) == name.endswith("o_norm.weight"), (name, error)
