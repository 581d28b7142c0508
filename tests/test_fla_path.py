"""Whole steps on what calls fla's kernels, with their parts in torch: in fp64, and the same as on the torch path.

`make test-kernels` runs steps on the kernels themselves, in fp16.
"""

import itertools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch import Tensor

from megatron_refine.config import Config
from tests import fla_parts
from tests.lanes import short
from tests.parity import relative, small_config
from tests.test_step import gradients_of_a_step
from tests.zygote import Zygote


def recurrent(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """As `fla._recurrent`."""
    from megatron_refine.kernels.delta_rule.chunk import chunk_delta_rule

    return chunk_delta_rule(q, k, v, beta, g, state)[:2]


def steps(config: Config) -> list[Any]:
    """On a rank: metrics, gradients and draws of a step on the torch path, then on fla's."""
    from megatron_refine.kernels.delta_rule import fla
    from megatron_refine.models.mixers.delta import mixer as delta

    found = [gradients_of_a_step(config)]
    parts = mock.patch.multiple(fla, _parts=fla_parts.parts, _recurrent=recurrent)
    with parts, mock.patch.object(delta, "delta_rule", side_effect=fla.fla_delta_rule) as rule:
        found.append(gradients_of_a_step(config))
    assert rule.called
    return found


UPDATES = [("fused", "none"), ("fused", "full"), ("two_pass", "none"), ("two_pass", "selective")]


@pytest.mark.parametrize(
    ("model", "update"),
    short(
        itertools.product(("delta_net", "gated_delta_net variant"), UPDATES),
        lambda model, update: (model == "delta_net") == (update[1] != "none"),
    ),
)
def test_a_step_on_flas_path(ranks: Zygote, tmp_path: Path, model: str, update: tuple[str, str]) -> None:
    mode, recompute = update
    config = small_config(tmp_path, f"update.mode={mode}", f"train.recompute={recompute}", model=model)
    (metrics, theirs, *drawn), (found, mine, *own) = ranks(1, steps, config=config)[0]
    assert all(a.equal(b) for a, b in zip(drawn, own, strict=True))
    for name in ("train/loss", "train/ntp_loss", "train/nsp_loss", "rollout/reward_mean"):
        assert found[name] == pytest.approx(metrics[name], rel=1e-10, abs=1e-12), name
    assert max(relative(mine, theirs).values()) < 1e-9  # fp64: the same products in another order
