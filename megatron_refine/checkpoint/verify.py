"""Compare a checkpoint with a folder in Hugging Face's format: hashes, every tensor, logits of both."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_refine.checkpoint.checkpoints import load_weights
from megatron_refine.checkpoint.conversion import MegatronSource
from megatron_refine.config import Config, Data, ModelConfig, Train
from megatron_refine.convert.errors import ConversionError
from megatron_refine.convert.source import HFSource
from megatron_refine.models import family
from megatron_refine.models.common.reference import cast_weights
from megatron_refine.models.layout import Branches
from megatron_refine.progress import counted
from megatron_refine.trainer.model import build_module
from megatron_refine.trainer.parallel import init_parallel

PROBE = 48  # tokens
# of the largest logit. Both compute in fp32 in another order: two layers differ by 2e-6, with Newton-Schulz by 3e-5,
# and layers add up; what stands in a wrong place differs by about 1. Values are compared before, bit by bit.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Verdict:
    tensors: int
    difference: float  # largest of the logits
    scale: float  # largest logit


def verify(hf: Path, megatron: Path, to_hf: bool) -> Verdict:
    """Read both folders anew and compare; `to_hf`: which of them is the output, whose dtypes may be narrower.

    Joins a process group of one rank if there is none. Raises ConfigError, CheckpointError, ConversionError.
    """
    theirs, ours = HFSource(hf), MegatronSource(megatron)
    if theirs.model.model_dump(exclude={"init_std"}) != ours.model.model_dump(exclude={"init_std"}):
        raise ConversionError(f"{hf}: {theirs.model} is not the model of {megatron}: {ours.model}")
    dtype = _compare_tensors(theirs, ours, to_hf)
    probe = family.of(ours.model.family).format.probe(ours.model)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, probe.vocab_size, (1, PROBE), generator=generator)
    with torch.no_grad():
        weights = cast_weights(theirs, dtype, torch.float32)
        expected = family.reference(probe)(probe, weights, tokens)
        found = _megatron_logits(probe, megatron, tokens, dtype)
    difference, scale = float((found - expected).abs().max()), float(expected.abs().max())
    if not difference <= TOLERANCE * max(scale, 1.0):
        raise ConversionError(
            f"{hf if to_hf else megatron}: logits differ by {difference:.3g}, the largest is {scale:.3g}: the "
            "conversion is wrong; delete it"
        )
    return Verdict(len(ours.specs), difference, scale)


def _compare_tensors(theirs: HFSource, ours: MegatronSource, to_hf: bool) -> torch.dtype:
    """Every tensor of the output is the input's, in the output's dtype. Returns the narrowest dtype of both."""
    dtypes = [spec.dtype for spec in [*theirs.specs.values(), *ours.specs.values()]]
    for name in counted(ours.specs, "compare", len(ours.specs), "tensors"):
        for part, tensor in ours.converter.to_hf(name, ours[name]):
            found, expected = (theirs[part], tensor) if to_hf else (tensor, theirs[part])
            if not found.equal(expected.to(found.dtype)):
                raise ConversionError(
                    f"{theirs.folder.path}: {part}: differs from {name} of {ours.path}; convert again"
                )
    return min(dtypes, key=lambda dtype: dtype.itemsize)


def _megatron_logits(model: ModelConfig, folder: Path, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the trainer's own model, in fp32, with weights rounded to `dtype`."""
    config = Config(
        model=model,
        data=Data(seq_length=max(8, tokens.shape[1])),
        train=Train(precision="fp32", global_batch_size=1),
    )
    own_group = not dist.is_initialized()
    built = build_module(config, init_parallel(config))
    load_weights(built, folder)
    for parameter in built.parameters():
        parameter.copy_(parameter.to(dtype))
    rows = built(tokens, None, None, packed_seq_params=Branches(main_len=tokens.shape[1]))
    logits = built.logits(rows[:, 0])[:, : model.vocab_size]
    if own_group:
        dist.destroy_process_group()
    return logits[None].cpu()
