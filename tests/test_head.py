"""What the head does on a GPU, as far as a CPU can say: gradients summed in fp32, both ways to the same numbers; rotary
tables; torch's fused AdamW."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_refine.config import Config
from megatron_refine.models.common.rope import first_positions, rope, table
from megatron_refine.models.lact.reference import _rope
from megatron_refine.platform import hardware
from tests import parity
from tests.zygote import Zygote

ROWS, WIDTH, VOCAB, CHUNK = 4096, 32, 512, 32
ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)  # a group of one rank


def summed() -> dict[str, float]:
    """On a rank: relative errors of a weight's bf16 gradient over 128 chunks; of sums of the chunks in bf16; of one."""
    from megatron_refine.trainer import head

    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(ROWS, WIDTH, generator=generator).bfloat16()
    weight = (0.1 * torch.randn(VOCAB, WIDTH, generator=generator)).bfloat16().requires_grad_()
    targets = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    outer = torch.full((ROWS,), -1 / ROWS)

    def gradient(elements: int) -> Tensor:
        head.CHUNK_ELEMENTS = elements
        logprobs, _, _ = head._VocabParallelScores.apply(rows, weight, targets, None, ALONE, VOCAB)
        (found,) = torch.autograd.grad((logprobs * outer).sum(), weight)
        return found.double()

    logits = (rows @ weight.mT).detach()
    totals = logits.float().logsumexp(-1)
    into = head._into_logits(logits, targets, None, totals, outer, VOCAB)
    exact = into.double().mT @ rows.double()
    low = torch.zeros(VOCAB, WIDTH, dtype=torch.bfloat16)
    for part, chunk in zip(into.split(CHUNK), rows.split(CHUNK), strict=True):
        low += part.mT @ chunk
    found = {"chunks": gradient(CHUNK * VOCAB), "whole": gradient(ROWS * VOCAB), "in bf16": low.double()}
    return {name: float((x - exact).norm() / exact.norm()) for name, x in found.items()}


def test_a_weights_gradient_loses_nothing_to_the_number_of_chunks(ranks: Zygote) -> None:
    """It is rounded to bf16 (2^-9) at the end; each chunk's product too on a CPU. Summed in bf16 it would lose more."""
    errors = ranks(1, summed)[0]
    assert errors["whole"] < 2**-9 and errors["chunks"] < 2 * errors["whole"]
    assert errors["in bf16"] > 5 * errors["chunks"]


def both_ways() -> list[tuple[Tensor, Tensor]]:
    """On a rank: the gradient of logits as a CPU computes it, and as a GPU would."""
    from megatron_refine.trainer import head

    generator, pairs = torch.Generator().manual_seed(2), []
    for dtype, at in ((torch.float64, None), (torch.float64, 0.7), (torch.bfloat16, None)):
        logits = torch.randn(9, 40, generator=generator, dtype=torch.float64).to(dtype)
        local = torch.tensor([-3, 0, 5, 39, 40, 41, 7, 7, 38])  # some are another rank's
        outer = torch.randn(9, generator=generator, dtype=torch.promote_types(dtype, torch.float32))
        temperature = None if at is None else torch.full((9,), at, dtype=torch.float64)
        given = logits, local, temperature, logits.double().logsumexp(-1).to(outer.dtype), outer, 37
        here = head._into_logits(*given)
        hardware.on_gpu, kept = (lambda tensor: True), hardware.on_gpu
        pairs.append((here, head._into_logits(*given)))
        hardware.on_gpu = kept
    return pairs


def test_a_gpu_finds_the_same_gradient_of_logits(ranks: Zygote) -> None:
    for here, there in ranks(1, both_ways)[0]:
        assert here.dtype == there.dtype
        torch.testing.assert_close(here, there, rtol=1e-15, atol=1e-15)  # the same sums


def test_turning_by_a_table_is_the_rotary_embedding() -> None:
    """Values and gradients, in fp64; the positions of a branch, too."""
    x = torch.randn(2, 40, 3, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weighting = torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found = []
    for turn in (
        lambda z: _rope(z, 1e4),
        lambda z: rope(z, *first_positions(40, 4, 1e4, z.dtype, z.device)),
        lambda z: rope(z, *table(torch.arange(40).expand(2, 40), 4, 1e4, z.dtype)),
    ):
        own = x.clone().requires_grad_()
        y = turn(own)
        found.append((y, *torch.autograd.grad((y * weighting).sum(), own)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-12)


def test_a_table_keeps_the_precision_of_long_positions() -> None:
    """An fp32 angle of a million would be 0.03 off. bf16 takes an fp32 table."""
    positions = torch.tensor([[1_000_003]])
    cos, sin = table(positions, 4, 1e6, torch.bfloat16)
    angles = positions[..., None].double() * 1e6 ** (-torch.arange(4, dtype=torch.float64) / 4)
    assert cos.dtype == sin.dtype == torch.float32
    assert float((cos - angles.cos()).abs().max()) < 1e-7 and float((sin - angles.sin()).abs().max()) < 1e-7


def steps(config: Config, fused: bool) -> Any:
    """On a rank: parameters after three steps, and again after `restart` and one more."""
    from megatron_refine.trainer.optimizer import Updater, fuse

    model, ranks = parity.build(config, torch.float32)
    updater = Updater(config, model, ranks)
    start = updater.weights()
    for adam in updater._torch_adams() if fused else ():
        fuse(adam)
    assert all(bool(group["fused"]) == fused for adam in updater._torch_adams() for group in adam.param_groups)
    generator, found = torch.Generator().manual_seed(7), []
    for step in range(4):
        if step == 3:
            found.append(parity.full_parameters(model))
            updater.restart(start)
        updater.optimizer.zero_grad()
        model.zero_grad_buffer()
        for parameter in model.parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        updater.optimizer.prepare_grads()
        updater._step(float(updater._squared_norm()) ** 0.5)
        updater.advance_schedule()
    return [*found, parity.full_parameters(model)]


def test_fused_adamw_takes_the_same_steps(ranks: Zygote, tmp_path: Path) -> None:
    """fp32 rounds at 6e-8; a step moves by the rate, 1e-2."""
    config = parity.small_config(tmp_path)
    plain, fused = (ranks(1, steps, config=config, fused=kind)[0] for kind in (False, True))
    for mine, theirs in zip(fused, plain, strict=True):
        assert max(parity.relative(mine, theirs).values()) < 1e-6


def test_the_norm_and_the_clipping_are_those_of_megatron(ranks: Zygote, tmp_path: Path) -> None:
    for found, expected in ranks(2, clipped, config=parity.small_config(tmp_path, "parallel.tp=2")):
        assert found[0] == pytest.approx(expected[0], rel=1e-6)
        assert max(parity.relative(found[1], expected[1]).values()) < 1e-6


def clipped(config: Config) -> Any:
    """On a rank: norm and parameters after a clipped step, by us and by Megatron's optimizer alone."""
    from megatron_refine.trainer.optimizer import Updater

    results = []
    for own in (True, False):
        model, ranks = parity.build(config, torch.float32)
        updater = Updater(config, model, ranks)
        updater.advance_schedule()
        model.zero_grad_buffer()
        generator = torch.Generator().manual_seed(7 + ranks.tp_rank)
        for parameter in model.parameters():
            same = not getattr(parameter, "tensor_model_parallel", False)
            use = torch.Generator().manual_seed(1) if same else generator
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=use))
        if own:
            updater.optimizer.prepare_grads()
            norm = float(updater._squared_norm()) ** 0.5
            updater._step(norm)
        else:
            _, norm, _ = updater.optimizer.step()
        results.append((norm, parity.full_parameters(model)))
    return results
