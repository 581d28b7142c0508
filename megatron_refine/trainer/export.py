"""The trainer's weights as whole tensors in Hugging Face's format: one at a time, or as a folder."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_refine.convert.fields import CONFIG, fresh_config
from megatron_refine.convert.hf_folder import INDEX, WEIGHTS
from megatron_refine.convert.hf_writer import FORMAT
from megatron_refine.convert.mapping import Converter
from megatron_refine.convert.tensorfile import Spec, TensorFileWriter
from megatron_refine.files import write_json
from megatron_refine.models import family
from megatron_refine.trainer.model import global_parameters, unwrap
from megatron_refine.trainer.parallel import Ranks
from megatron_refine.trainer.shards import is_sharded, unshard


def is_source(ranks: Ranks) -> bool:
    """Whether this rank gets the whole tensors of its pipeline stage: the first of the first replica does."""
    return ranks.replica_group.rank() == 0 and ranks.tp_rank == 0


@torch.no_grad()
def stage_tensors(model: nn.Module, converter: Converter, ranks: Ranks) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of this rank's pipeline stage on its source rank; nothing on others.

    Every rank of the first replica must run it to its end, see `to_the_end`: tensors are gathered over tp.
    """
    if ranks.replica_group.rank():
        return
    for name, parameter in _own_parameters(model):
        parts = [parameter.detach()]
        if is_sharded(parameter) and ranks.tp > 1:
            parts = [torch.empty_like(parts[0]) for _ in range(ranks.tp)]
            dist.all_gather(parts, parameter.detach().contiguous(), group=ranks.tp_group)
        if is_source(ranks):
            yield from converter.to_hf(name, unshard(parts, parameter))


@contextlib.contextmanager
def to_the_end(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[Iterator[tuple[str, Tensor]]]:
    """The rest is run through when the block fails: the other tp ranks are in the same gathers."""
    try:
        yield tensors
    finally:
        for _ in tensors:
            pass


def write_stage(model: nn.Module, converter: Converter, ranks: Ranks, folder: Path) -> dict[str, str]:
    """Write this stage's weights into its own file of `folder`. Returns name -> file, on the source rank."""
    file = WEIGHTS if ranks.pp == 1 else f"model-{ranks.pp_rank + 1:05d}-of-{ranks.pp:05d}.safetensors"
    with to_the_end(stage_tensors(model, converter, ranks)) as tensors:
        if not is_source(ranks):
            return {}
        specs = {
            theirs: Spec(parameter.dtype, converter.hf_shapes[theirs])
            for name, parameter in _own_parameters(model)
            for theirs in converter.sources(name)
        }
        writer = TensorFileWriter(folder / file, specs, FORMAT)
        for name, tensor in tensors:
            writer.write(name, tensor)
    assert not writer.missing
    return dict.fromkeys(specs, file)


def write_rest(folder: Path, model: Any, dtype: torch.dtype, files: dict[str, str], positions: int) -> None:
    """Write a server's config.json, and the index where several stages wrote a file each.

    files: name -> file, of all stages. positions: as of `fresh_config`.
    """
    tree = fresh_config(model, str(dtype).removeprefix("torch."), positions)
    write_json(folder / CONFIG, tree | family.served_as(family.of(model.family)), indent=2)
    if set(files.values()) != {WEIGHTS}:
        tree = {"metadata": {}, "weight_map": dict(sorted(files.items()))}
        write_json(folder / INDEX, tree, indent=2)


def empty_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Those of this stage but for the copy of a tied embedding on the last one: the first has it."""
    for name, parameter in global_parameters(module):
        if unwrap(module).pre_process or not name.startswith("embedding."):
            yield name, parameter
