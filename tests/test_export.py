"""The weights as servers read them: whole tensors in Hugging Face's format, from any layout; no SGLang here."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_refine.config import Config
from tests.parity import build, small_config
from tests.zygote import Zygote

LAYOUTS = {
    "one rank": (1, []),
    "tp2 pp2": (4, ["parallel.tp=2", "parallel.pp=2"]),
    "cp2 dp2": (4, ["parallel.cp=2", "train.micro_batch_size=1"]),
}


def written(config: Config, folder: str) -> dict[str, Tensor] | None:
    """On a rank: write all stages' files, then read them as any reader of the format does; on the first rank."""
    from megatron_refine.convert.mapping import Converter
    from megatron_refine.convert.source import HFSource
    from megatron_refine.exchange import everyone
    from megatron_refine.trainer.export import empty_folder, write_rest, write_stage

    model, ranks = build(config, torch.float32)
    if ranks.is_main:
        empty_folder(Path(folder))
    dist.barrier()
    stages = everyone(write_stage(model, Converter(config.model), ranks, Path(folder)))
    if not ranks.is_main:
        return None
    files = {name: file for stage in stages for name, file in stage.items()}
    write_rest(Path(folder), config.model, torch.float32, files, 192)
    source = HFSource(Path(folder))
    return {name: source[name] for name in source.specs}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["delta_net", "lact"])
def test_each_layout_writes_the_same_tensors(model: str, ranks: Zygote, tmp_path: Path) -> None:
    """With a tied head, of which the last stage has a copy."""
    found = {}
    for name, (world, overrides) in LAYOUTS.items():
        config = small_config(tmp_path, "model.tie_embeddings=true", *overrides, model=model)
        found[name] = ranks(world, written, config=config, folder=str(tmp_path / name))[0]
    one = found["one rank"]
    assert len(one) > 10 and "lm_head.weight" not in one
    for name, tensors in found.items():
        assert tensors.keys() == one.keys() and all(tensors[key].equal(one[key]) for key in one), name


def failing(config: Config) -> int:
    """On a rank: the source gives up after its first tensor; then all ranks meet again."""
    from megatron_refine.convert.mapping import Converter
    from megatron_refine.trainer.export import is_source, stage_tensors, to_the_end

    model, ranks = build(config, torch.float32)
    seen = 0
    try:
        with to_the_end(stage_tensors(model, Converter(config.model), ranks)) as tensors:
            for _ in tensors:
                seen += 1
                raise OSError("no space left")
    except OSError:
        assert is_source(ranks)
    told: list[Any] = [None] * ranks.world
    dist.all_gather_object(told, (ranks.rank, seen))
    assert told == [(0, 1), (1, 0)], told
    return seen


def test_a_source_that_fails_leaves_no_rank_in_a_gather(ranks: Zygote, tmp_path: Path) -> None:
    assert ranks(2, failing, 60, config=small_config(tmp_path, "parallel.tp=2")) == [1, 0]
