"""A model in Hugging Face's format whose every field and tensor is accounted for."""

from pathlib import Path

import torch
from torch import Tensor

from megatron_refine.convert import inventory
from megatron_refine.convert.fields import CONFIG, model_of
from megatron_refine.convert.hf_folder import HFFolder
from megatron_refine.convert.mapping import Converter, common_dtype
from megatron_refine.convert.tensorfile import Spec


class HFSource:
    """Reads tensors by today's names, whatever names the folder has for them. Raises ConfigError, ConversionError."""

    def __init__(self, path: Path):
        self.folder = HFFolder(path)
        self.model = model_of(self.folder.config, str(path / CONFIG))
        self.converter = Converter(self.model)
        specs, described = self.folder.specs, self.converter.format
        self.stored = inventory.stored_names(described, set(specs), set(self.converter.hf_shapes))
        rest = set(specs) - set(self.stored.values())
        self.unused = sorted(inventory.unused_names(described, rest))
        self.specs = {now: specs[name] for now, name in self.stored.items()}
        extra = {name: specs[name] for name in rest.difference(self.unused)}
        inventory.check(str(path), self.specs | extra, self.converter.hf_shapes)

    def __getitem__(self, name: str) -> Tensor:
        return self.folder[self.stored[name]]


def megatron_specs(converter: Converter, dtypes: dict[str, torch.dtype]) -> dict[str, Spec]:
    """Full Megatron tensors made of tensors of these `dtypes`, by name in Hugging Face's format.

    A checkpoint stacks the layers of a tensor, so all layers have the dtype that holds every part of any of them.
    """
    groups: dict[str, list[torch.dtype]] = {}
    for name in converter.megatron_shapes:
        groups.setdefault(converter.kind(name), []).extend(dtypes[source] for source in converter.sources(name))
    common = {kind: common_dtype(found) for kind, found in groups.items()}
    return {name: Spec(common[converter.kind(name)], shape) for name, shape in converter.megatron_shapes.items()}
