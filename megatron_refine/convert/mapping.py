"""Full Megatron tensors <-> tensors in Hugging Face's format, one at a time, by the mappings of the family."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_refine.config import ModelConfig
from megatron_refine.models import family
from megatron_refine.models.hf import Heads, Mapping, Same, Shape, Vocab, at_layer


class Converter:
    """The tensors of a model on both sides. Megatron's go by their global names, as in `decoder.layers.3.*`."""

    def __init__(self, model: ModelConfig):
        self.format = family.of(model.family).format
        self._mappings: dict[str, Mapping] = {}
        self._kinds: dict[str, str] = {}
        frame = [(mapping, 0) for mapping in self.format.frame(model)]
        layers = [(mapping, i) for i, layer in enumerate(family.layers(model)) for mapping in layer.tensors]
        for mapping, i in frame + layers:
            filled = at_layer(mapping, i)
            self._mappings[filled.ours], self._kinds[filled.ours] = filled, mapping.ours
        self.megatron_shapes: dict[str, Shape] = {name: m.shape for name, m in self._mappings.items()}
        self.hf_shapes: dict[str, Shape] = {}
        for filled in self._mappings.values():
            self.hf_shapes |= filled.sources()

    def sources(self, name: str) -> list[str]:
        """Names in Hugging Face's format of the tensors that make up the Megatron tensor `name`."""
        return list(self._mappings[name].sources())

    def kind(self, name: str) -> str:
        """The name with {} for its layer."""
        return self._kinds[name]

    def to_hf(self, name: str, full: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The full tensor `name` -> (their name, tensor) of each of its parts. Any dtype and device.

        Views of `full` where it holds them as they are, else copies.
        """
        mapping = self._mappings[name]
        assert tuple(full.shape) == mapping.shape, f"{name}: {tuple(full.shape)}, not {mapping.shape}"
        match mapping:
            case Same():
                yield mapping.theirs, full
                return
            case Vocab():
                yield mapping.theirs, full[: mapping.rows]
                return
        parts = {theirs: full.new_empty(shape) for theirs, shape in mapping.sources().items()}
        for ours, theirs in _views(mapping, full, parts):
            theirs.copy_(ours)
        yield from parts.items()

    def to_megatron(self, name: str, hf: Any) -> Tensor:
        """The full Megatron tensor `name` from `hf[their name]`, a dict or anything that reads tensors by name.

        Parts of different dtypes make a tensor of the dtype that holds them all.
        """
        mapping = self._mappings[name]
        parts = {theirs: hf[theirs] for theirs in mapping.sources()}
        first = next(iter(parts.values()))
        full = torch.zeros(mapping.shape, dtype=common_dtype([t.dtype for t in parts.values()]), device=first.device)
        for ours, theirs in _views(mapping, full, parts):
            ours.copy_(theirs)
        return full


def common_dtype(dtypes: list[torch.dtype]) -> torch.dtype:
    """The smallest dtype that holds the values of all."""
    result = dtypes[0]
    for dtype in dtypes[1:]:
        result = torch.promote_types(result, dtype)
    return result


def _views(mapping: Mapping, full: Tensor, parts: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of the Megatron tensor and of its parts that hold the same numbers: copied one way or the other."""
    match mapping:
        case Same():
            yield full, parts[mapping.theirs]
        case Vocab():
            yield full[: mapping.rows], parts[mapping.theirs]
        case Heads():
            heads, widths = mapping.heads, [rows for _, rows in mapping.parts]
            blocks = full.unflatten(0, (heads, -1)).split(widths, 1)
            for numbers in mapping.interleaved:
                whole = parts[mapping.parts[numbers[0]][0]].unflatten(0, (heads, -1))
                yield from zip([blocks[i] for i in numbers], whole.split([widths[i] for i in numbers], 1), strict=True)
            used = dict.fromkeys(parts, 0)
            for i, (block, (name, rows)) in enumerate(zip(blocks, mapping.parts, strict=True)):
                if any(i in numbers for numbers in mapping.interleaved):
                    continue
                yield block, parts[name].narrow(0, used[name], heads * rows).unflatten(0, (heads, rows))
                used[name] += heads * rows
