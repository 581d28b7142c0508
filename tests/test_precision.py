"""Training in bf16: what stays in fp32, what a step makes of the weights, and how a run goes on.

And which linear layers and kernels a run says that it uses.
"""

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_refine import extras
from megatron_refine.config import Config, ConfigError
from megatron_refine.kernels.places import Places
from megatron_refine.platform import hardware
from tests.lanes import short
from tests.parity import batch, full_gradients, full_parameters, relative, small_config
from tests.runs import TP2
from tests.test_checkpoint import loaded_saved_continued, two_steps_saved
from tests.test_step import make_step
from tests.zygote import Zygote

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []), "dp2": (2, ["train.micro_batch_size=1"]), "tp2 sp": (2, TP2), "cp2": (2, ["parallel.cp=2"])
}  # fmt: skip
FAMILIES = ["delta_net", "gated_delta_net", "lact"]


def bf16(tmp_path: Path, model: str, *overrides: str) -> Config:
    return small_config(tmp_path, "train.precision=bf16", "optimizer.clip_grad=1000.0", *overrides, model=model)


def against_adamw(config: Config) -> list[int]:
    """On a rank: after each of three steps, weights that are not bf16(AdamW on fp32 weights, the same gradients)."""
    step = make_step(config, torch.bfloat16, optimizer=True)
    o = config.optimizer
    masters = {name: p.float() for name, p in full_parameters(step.model).items()}
    groups = [
        {"params": [m for m in masters.values() if (m.dim() == 1) == vectors], "weight_decay": decay}
        for vectors, decay in ((False, o.weight_decay), (True, 0.0))
    ]
    adam = torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps)
    share, different = 4 // step.ranks.dp, []
    for i in range(3):
        mine = batch(4, seed=i).rows(slice(step.ranks.dp_rank * share, (step.ranks.dp_rank + 1) * share))
        for group in adam.param_groups:
            group["lr"] = step.updater.lr
        step(mine, i, refine=True)
        gradients = full_gradients(step.model)
        assert all(g.dtype == torch.float32 for g in gradients.values())
        for name, master in masters.items():
            master.grad = gradients[name]
        adam.step()
        found = full_parameters(step.model)
        assert all(p.dtype == torch.bfloat16 for p in found.values())
        different.append(sum(int((found[n] != m.bfloat16()).sum()) for n, m in masters.items()))
    return different


@pytest.mark.parametrize(
    ("model", "layout"),
    short(
        itertools.product(FAMILIES, LAYOUTS),
        lambda model, layout: model == "delta_net" or (model, layout) == ("lact", "one"),
    ),
)
def test_a_step_is_adamws_on_fp32_weights(ranks: Zygote, tmp_path: Path, model: str, layout: str) -> None:
    """Bit by bit: the same operations on every element, whichever rank it lies on."""
    world, overrides = LAYOUTS[layout]
    assert ranks(world, against_adamw, config=bf16(tmp_path, model, *overrides)) == [[0, 0, 0]] * world


def dtypes(config: Config) -> dict[str, set[torch.dtype]]:
    """On a rank: of the states in the middle of a sequence, and of the decays."""
    from megatron_refine.trainer import forward

    step = make_step(config, torch.bfloat16, optimizer=True)
    with torch.no_grad():
        main = forward.main_pass(step.model, batch(1).tokens)
        trace = getattr(main.handles[1], "trace", None)
        decays = {g.dtype for g in getattr(trace, "decays", None) or []}
        state: Any = main.states(Places.read(torch.tensor([0]), torch.tensor([100])))[1]
    memory = [state.memory] if hasattr(state, "memory") else [m for w in state.weights for m in (w.total, w.moved)]
    adam = step.updater.parts[0].optimizer
    moments = {v.dtype for s in adam.state.values() for k, v in s.items() if k != "step"}
    return {"memory": {m.dtype for m in memory}, "decays": decays, "moments": moments}


@pytest.mark.parametrize("model", FAMILIES)
def test_states_decays_and_moments_are_fp32(ranks: Zygote, tmp_path: Path, model: str) -> None:
    found = ranks(1, dtypes, config=bf16(tmp_path, model))[0]
    assert found["memory"] == found["moments"] == {torch.float32}
    assert found["decays"] == ({torch.float32} if model == "gated_delta_net" else set())


def gradients_of(config: Config) -> Any:
    """On a rank: whole gradients of a REFINE step in the configuration's precision, its metrics, its draws."""
    step = make_step(config, torch.bfloat16, optimizer=True)
    metrics = step(batch(4), 0, refine=True)
    return metrics, full_gradients(step.model), step.last.experience.tokens


@pytest.mark.parametrize("model", FAMILIES)
def test_fused_and_two_pass_agree_to_bf16s_rounding(ranks: Zygote, tmp_path: Path, model: str) -> None:
    """Products of 8 bits in another grouping: 3 % of a gradient's length, of which the two differ in direction."""
    found = [ranks(1, gradients_of, config=bf16(tmp_path, model, f"update.mode={m}"))[0] for m in ("fused", "two_pass")]
    (fused, gradients, tokens), (two_pass, expected, drawn) = found
    assert tokens.equal(drawn)  # both draw from the same passes
    assert max(relative(gradients, expected).values()) < 0.05
    assert fused["train/ntp_loss"] == pytest.approx(two_pass["train/ntp_loss"], rel=2e-3)
    # decoding a token at a time and k at once round differently: eight bits of logits of size 5
    assert 0 < fused["rollout/logprob_gap_max"] < 0.2


@pytest.mark.parametrize("layout", ["one", "tp2 sp"])
def test_a_run_goes_on_bit_by_bit(ranks: Zygote, tmp_path: Path, layout: str) -> None:
    """Weights, fp32 weights and moments: the step after a checkpoint is that of the run that was never stopped."""
    world, overrides = LAYOUTS[layout]
    config = bf16(tmp_path, "delta_net", "train.micro_batch_size=1", *overrides)
    expected = ranks(world, two_steps_saved, config=config)[0][0]
    (tmp_path / "later").mkdir()
    later = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(tmp_path / "later/run")})})
    source = Path(config.run.dir) / "checkpoints/step_0000002"
    for metrics, _, _ in ranks(world, loaded_saved_continued, config=later, source=source):
        for key in ("train/ntp_loss", "train/grad_norm"):
            assert metrics[key] == expected[key], key


def restarted(config: Config) -> list[dict[str, torch.Tensor]]:
    """On a rank: the weights after a step, and after the same step from the weights before it."""
    step = make_step(config, torch.bfloat16, optimizer=True)
    start, found = step.updater.weights(), []
    for _ in range(2):
        step.updater.restart(start)
        step(batch(4), 0, refine=True)
        found.append({name: p.detach().clone() for name, p in full_parameters(step.model).items()})
    return found


def test_a_restart_returns_to_the_weights_in_fp32_too(ranks: Zygote, tmp_path: Path) -> None:
    """Which the optimizer holds beside those in bf16: a step would bring back what was learned before."""
    first, again = ranks(1, restarted, config=bf16(tmp_path, "delta_net", "optimizer.schedule=constant"))[0]
    assert [name for name in first if not first[name].equal(again[name])] == []


def said(config: Config) -> str:
    from megatron_refine.run.used import used

    return used(config, make_step(config, torch.bfloat16, optimizer=True).updater.parts)


def test_a_run_says_what_it_uses(ranks: Zygote, tmp_path: Path) -> None:
    line = ranks(1, said, config=bf16(tmp_path, "lact", "train.recompute=selective"))[0]
    assert line == (
        "bf16, fp32 master weights, torch AdamW; window attention: torch; linear layers: local; recomputed: mixer"
    )


def test_a_run_on_a_gpu_says_where_its_kernels_configurations_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_refine.kernels import tuning
    from megatron_refine.run.used import _kernels

    model = small_config(tmp_path).model
    assert _kernels(model) == "delta rule: torch"
    monkeypatch.setattr(hardware, "has_gpu", lambda: True)
    monkeypatch.setattr(hardware, "architecture", lambda: "sm_90")
    kernels = {"a": {"by": "measured"}, "b": {"by": "compiled"}}
    monkeypatch.setattr(tuning, "table", lambda _: {"shapes": {"K256 V256": {"kernels": kernels}}})
    assert _kernels(model) == (
        f"delta rule: flash-linear-attention {extras.FLA}, configurations pinned for sm_90, 1 of 2 by measurement"
    )


def test_transformer_engine_is_taken_where_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not run here: that it is installed is what cannot be shown for real."""
    from megatron_refine.trainer.layers import linears

    def config(backend: str) -> Config:
        return small_config(tmp_path, f"train.backend={backend}")

    assert [linears(config(backend)) for backend in ("local", "auto")] == ["local", "local"]
    with pytest.raises(ConfigError, match="train.backend=te: Transformer Engine is not installed; install it"):
        linears(config("te"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "transformer_engine" else None)
    assert [linears(config(backend)) for backend in ("local", "auto", "te")] == ["local", "te", "te"]


def begun_again(config: Config) -> list[bool]:
    """On a rank: whether the weights after a step are those of the same step again from the same start; bit by bit."""
    step = make_step(config, torch.bfloat16 if config.train.precision == "bf16" else torch.float32, optimizer=True)
    share, start, ends = 4 // step.ranks.dp, step.updater.weights(), []
    for _ in range(3):
        step(batch(4).rows(slice(step.ranks.dp_rank * share, (step.ranks.dp_rank + 1) * share)), 0, refine=True)
        ends.append(full_parameters(step.model))
        step.updater.restart(start)
        assert all(torch.equal(a, b) for a, b in zip(step.updater.weights(), start, strict=True))
    return [torch.equal(other[name], value) for other in ends[1:] for name, value in ends[0].items()]


@pytest.mark.parametrize("layout", short(("one", "dp2"), lambda layout: layout == "one"))
@pytest.mark.parametrize("precision", short(("fp32", "bf16"), lambda precision: precision == "bf16"))
def test_a_batch_that_starts_again_forgets_the_one_before(
    ranks: Zygote, tmp_path: Path, precision: str, layout: str
) -> None:
    """The optimizer's own weights and moments too, as in test-time training."""
    world, overrides = LAYOUTS[layout]
    config = small_config(tmp_path, f"train.precision={precision}", "optimizer.schedule=constant", *overrides)
    assert all(map(all, ranks(world, begun_again, config=config)))


def first_metrics(config: Config) -> dict[str, float]:
    """On a rank: of a two-pass REFINE step."""
    step = make_step(config, torch.bfloat16, optimizer=True)
    found: dict[str, float] = step(batch(4), 0, refine=True)
    return {key: value for key, value in found.items() if key.startswith(("train/", "rollout/"))}


@pytest.mark.slow
def test_a_pipeline_hands_on_what_one_rank_computes(ranks: Zygote, tmp_path: Path) -> None:
    """In scoring, rollouts and update: layers on two stages are the same layers, so nothing is rounded otherwise."""
    one, two = (
        ranks(world, first_metrics, config=bf16(tmp_path, "delta_net", "update.mode=two_pass", *overrides))[0]
        for world, overrides in ((1, []), (2, ["parallel.pp=2"]))
    )
    assert len(one) > 12 and one == pytest.approx(two, rel=1e-4, abs=1e-6)
