"""Gradients reduced in many buckets, while the backward pass goes on: the same bits as in one bucket after it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_refine.config import Config
from tests.lanes import short
from tests.parity import small_config
from tests.runs import TP2
from tests.test_checkpoint import all_plain, loaded_saved_continued, two_steps_saved
from tests.test_updates import OVERLAP, buckets
from tests.zygote import Zygote

CASES: dict[str, tuple[int, str, list[str]]] = {  # ranks, family, overrides; four sequences a batch
    "fused, two micro-batches": (2, "delta_net", ["train.micro_batch_size=1"]),
    "two-pass, bf16": (2, "delta_net", ["train.precision=bf16", "update.mode=two_pass"]),
    "partial gradients of norms, tp2 dp2": (4, "gated_delta_net", [*TP2, "train.micro_batch_size=1"]),
    "tied, bf16": (2, "delta_net", ["train.precision=bf16", "model.tie_embeddings=true", "train.micro_batch_size=1"]),
    "lact, recomputed": (2, "lact", ["train.recompute=full"]),
    "next tokens alone, cp2": (2, "delta_net", ["refine.enabled=false", "parallel.cp=2"]),
}
STEP = "checkpoints/step_0000002"


def configured(folder: Path, family: str, *overrides: str) -> Config:
    folder.mkdir()
    return small_config(folder, "optimizer.clip_grad=1000.0", *overrides, model=family)


def run(ranks: Zygote, world: int, config: Config) -> tuple[Path, Any]:
    """The checkpoint after two steps, and the metrics of the third."""
    found = ranks(world, two_steps_saved, config=config)
    return Path(config.run.dir) / STEP, found[0][0]


def differing(ranks: Zygote, first: Path, *others: Path) -> list[list[str]]:
    """Names of tensors that are not those of the first checkpoint, in each other one."""
    expected, *found = ranks(1, all_plain, folders=[first, *others])[0]
    assert any(name.endswith("weight") for name in expected) and all(t.keys() == expected.keys() for t in found)
    return [[name for name in expected if not torch.equal(tensors[name], expected[name])] for tensors in found]


@pytest.mark.parametrize("case", short(CASES, lambda case: case in list(CASES)[:2]))
def test_many_buckets_are_as_one(ranks: Zygote, tmp_path: Path, case: str) -> None:
    """Weights and moments bit for bit: a sum over two replicas has one order. The norm's has not: nothing is clipped
    by it."""
    world, family, overrides = CASES[case]
    one, expected = run(ranks, world, configured(tmp_path / "one", family, *overrides, "train.overlap=false"))
    config = configured(tmp_path / "many", family, *overrides, *OVERLAP)
    assert ranks(world, buckets, config=config)[0][0] > 8
    many, found = run(ranks, world, config)
    assert differing(ranks, one, many) == [[]]
    assert found["train/ntp_loss"] == expected["train/ntp_loss"]
    assert found["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=1e-6)


def test_a_checkpoint_goes_on_with_any_number_of_buckets(ranks: Zygote, tmp_path: Path) -> None:
    """One bucket at dp2 -> many at dp2 -> one at tp2: every tensor as it was, moments too, and the run goes on."""
    first, expected = run(ranks, 2, configured(tmp_path / "first", "delta_net", "train.micro_batch_size=1"))
    folders = [first]
    for name, overrides in (("many", OVERLAP), ("tp2", TP2)):
        config = configured(tmp_path / name, "delta_net", "train.micro_batch_size=1", *overrides)
        for metrics, counters, _ in ranks(2, loaded_saved_continued, config=config, source=folders[-1]):
            assert counters == {3}
            for key in ("train/ntp_loss", "train/grad_norm"):  # tp2: fp32 sums in another order
                assert metrics[key] == pytest.approx(expected[key], rel=1e-5), key
        folders.append(Path(config.run.dir) / STEP)
    assert differing(ranks, *folders) == [[], []]
