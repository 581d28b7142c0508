"""A checkpoint's weights as full tensors, one at a time, without a model and without ranks.

Megatron's torch_dist format is that of torch.distributed.checkpoint: tensors are stored in the pieces that the ranks
held. Where all layers have the same tensors, they are stacked under one key (`decoder.layers.mlp.linear_fc1.weight`
[L, ...]). Here they go by their global names (`decoder.layers.3.mlp.linear_fc1.weight`), as where layers differ.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, save
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_refine.checkpoint.pickles import CONFIG, WITH_COMMON
from megatron_refine.convert.tensorfile import Spec
from megatron_refine.files import write_json

LAYERS = "decoder.layers."
NO_WEIGHTS = re.compile(r"optimizer\..*|rng/.*|.*\._extra_state(/.*)?")  # what else a checkpoint of a run holds


class PlainReader:
    """The weights of a checkpoint folder, whatever layout it was saved at."""

    def __init__(self, folder: Path):
        self._reader = FileSystemReader(folder)
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self.specs: dict[str, Spec] = {}
        for key, stored in self._metadata.state_dict_metadata.items():
            if isinstance(stored, TensorStorageMetadata) and not NO_WEIGHTS.fullmatch(key):
                self.specs |= _unstacked(key, Spec(stored.properties.dtype, tuple(stored.size)))

    def __getitem__(self, name: str) -> Tensor:
        """The full tensor `name`."""
        spec, (key, layer) = self.specs[name], _stacked(name)
        if name in self._metadata.state_dict_metadata:
            key, layer = name, None
        full = torch.empty(spec.shape if layer is None else (1, *spec.shape), dtype=spec.dtype)
        offsets = torch.Size([layer or 0, *[0] * (full.dim() - 1)])
        chunk = ChunkStorageMetadata(offsets=offsets, sizes=full.shape)
        stored = self._metadata.state_dict_metadata[key]
        assert isinstance(stored, TensorStorageMetadata)
        items = create_read_items_for_chunk_list(key, stored, [chunk])
        self._reader.read_data(LoadPlan(items), _Into(full)).wait()
        return full.view(spec.shape)


class _Into(DefaultLoadPlanner):
    """Copies what is read into one tensor."""

    def __init__(self, target: Tensor):
        super().__init__()
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        target = self.target
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dim, start, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass

    def load_bytes(self, read_item: ReadItem, value: Any) -> NoReturn:
        raise AssertionError("weights are tensors")


def write_plain(folder: Path, specs: dict[str, Spec], produce: Callable[[str], Tensor]) -> None:
    """Write the weights that `produce(name)` gives, one at a time, as a checkpoint for any layout."""
    try:
        save({}, storage_writer=FileSystemWriter(folder), planner=_OneByOne(specs, produce), no_dist=True)
    except CheckpointException as error:  # what was raised inside, `produce` included
        raise error.failures[0][0] from None
    torch.save({}, folder / "common.pt")  # what all ranks have in common: nothing
    write_json(folder / CONFIG, WITH_COMMON)  # the format that every version reads


class _OneByOne(DefaultSavePlanner):
    """Plans from shapes alone; makes each tensor when it is written."""

    def __init__(self, specs: dict[str, Spec], produce: Callable[[str], Tensor]):
        super().__init__(flatten_state_dict=False)
        self.specs, self.produce = specs, produce
        layers: dict[int | None, set[object]] = {}
        for name, spec in specs.items():
            key, layer = _stacked(name)
            layers.setdefault(layer, set()).add((key, spec.shape))
        layers.pop(None, None)
        self.num_layers = len(layers)
        self.stacked = len({frozenset(each) for each in layers.values()}) == 1

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([self._item(name, spec) for name, spec in self.specs.items()])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        key, offset = write_item.index.fqn, write_item.index.offset
        in_stack = self.stacked and key.startswith(LAYERS)
        name = f"{LAYERS}{offset[0]}.{key.removeprefix(LAYERS)}" if in_stack else key  # type: ignore[index]
        tensor = self.produce(name)
        assert Spec(tensor.dtype, tuple(tensor.shape)) == self.specs[name], name
        return tensor[None] if in_stack else tensor

    def _item(self, name: str, spec: Spec) -> WriteItem:
        key, layer = _stacked(name) if self.stacked else (name, None)
        sizes = torch.Size(spec.shape if layer is None else (1, *spec.shape))
        whole = torch.Size(spec.shape if layer is None else (self.num_layers, *spec.shape))
        chunk = ChunkStorageMetadata(torch.Size([layer or 0, *[0] * (len(sizes) - 1)]), sizes)
        return WriteItem(
            index=MetadataIndex(key, chunk.offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(chunk, TensorProperties(dtype=spec.dtype), whole),
        )


def _stacked(name: str) -> tuple[str, int | None]:
    """A global name -> the key that it stands under, and its layer there."""
    match = re.fullmatch(rf"{re.escape(LAYERS)}(\d+)\.(.*)", name)
    return (LAYERS + match[2], int(match[1])) if match else (name, None)


def _unstacked(key: str, spec: Spec) -> dict[str, Spec]:
    """A key -> what stands under it, by global names."""
    if not key.startswith(LAYERS) or _stacked(key)[1] is not None:
        return {key: spec}
    count, *shape = spec.shape
    return {f"{LAYERS}{i}.{key.removeprefix(LAYERS)}": Spec(spec.dtype, tuple(shape)) for i in range(count)}
