"""Many buckets: gradients reduced while the backward pass goes on, weights gathered while the forward pass does.

The same bits as in one bucket, reduced and gathered between the passes.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_refine.config import Config
from tests.lanes import short
from tests.parity import small_config
from tests.runs import TP2
from tests.test_checkpoint import all_plain, loaded_saved_continued, part, start, two_steps_saved
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


@pytest.mark.parametrize("case", short(CASES, lambda case: case == list(CASES)[1]))
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


@pytest.mark.slow
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


def on_their_way(config: Config) -> tuple[list[int], int]:
    """On a rank, after one step: buckets that are being gathered as each layer begins; and how many there are."""
    from megatron_refine.trainer import forward
    from megatron_refine.trainer.model import unwrap

    step, _ = start(config)
    step(part(0, step), 0, refine=False)
    groups, found = step.model.bucket_groups, list[int]()
    for layer in unwrap(step.model).decoder.layers:
        layer.register_forward_pre_hook(
            lambda *_: found.append(sum(group.param_gather_handle is not None for group in groups))
        )
    with torch.no_grad():
        forward.main_pass(step.model, part(1, step).tokens)
        forward.main_pass(step.model, part(1, step).tokens)
    return found, len(groups)


def test_layers_do_not_wait_for_the_weights_of_later_ones(ranks: Zygote, tmp_path: Path) -> None:
    """The first pass after a step gathers them, the second does not."""
    config = configured(tmp_path / "lazy", "delta_net", "train.micro_batch_size=1", *OVERLAP)
    for found, groups in ranks(2, on_their_way, config=config):
        layers = len(found) // 2
        assert layers == 2 and groups > found[0] > found[1] > 0 and found[layers:] == [0] * layers


READERS = ("a forward pass", "the parameters by name", "a checkpoint", "a copy to return to")


def read_after_a_step(config: Config, reader: str) -> list[list[torch.Tensor]]:
    """On a rank, after one step: the parameters where they lie before they are read, and after."""
    from megatron_refine.trainer import forward
    from megatron_refine.trainer.model import global_parameters, unwrap

    step, _ = start(config)
    step(part(0, step), 0, refine=False)
    inner = unwrap(step.model)
    found = [[p.detach().clone() for p in inner.parameters()]]
    if reader == READERS[0]:
        with torch.no_grad():
            forward.main_pass(step.model, part(1, step).tokens)
    elif reader == READERS[1]:
        next(global_parameters(step.model))
    elif reader == READERS[2]:
        inner.sharded_state_dict()
    else:
        step.updater.weights()
    return [*found, [p.detach().clone() for p in inner.parameters()]]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("layout", ["dp2", "pp2 dp2, tied"])
def test_whoever_reads_the_weights_has_those_of_the_last_step(
    ranks: Zygote, tmp_path: Path, reader: str, layout: str
) -> None:
    """Until then each replica has new values of its own share alone."""
    world, overrides = (2, []) if layout == "dp2" else (4, ["parallel.pp=2", "model.tie_embeddings=true"])
    overrides.append("train.micro_batch_size=1")
    config = configured(tmp_path / "plain", "delta_net", *overrides, "train.overlap=false")
    expected = ranks(world, read_after_a_step, config=config, reader=reader)
    found = ranks(world, read_after_a_step, config=configured(tmp_path / "lazy", "delta_net", *overrides, *OVERLAP),
                  reader=reader)  # fmt: skip
    for (before, after), (_, wanted) in zip(found, expected, strict=True):
        assert not all(map(torch.equal, before, wanted))
        assert all(map(torch.equal, after, wanted))
