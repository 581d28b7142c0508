"""Muon, as Megatron-Core builds it from NVIDIA's package emerging_optimizers: its settings, and what it updates.

It orthogonalises the momentum of each matrix of a linear layer. All else is Adam's: the embedding, the output layer,
norms, biases, convolutions, and a mixer's own parameters. A matrix must be whole for it, so the distributed optimizer,
which cuts all parameters into even pieces, is off: each data-parallel rank holds the state of all parameters that it
has. In a checkpoint the state is cut as the weights are, so it loads at any layout.
"""

from typing import Any

import torch
from torch import nn

from megatron_refine.config import Config
from megatron_refine.models import family
from megatron_refine.models.hf import Heads, at_layer
from megatron_refine.trainer.model import global_parameters


def settings(config: Config) -> dict[str, Any]:
    """Return Muon's fields of Megatron's OptimizerConfig."""
    o = config.optimizer
    return {
        "muon_momentum": o.muon_momentum,
        "muon_num_ns_steps": o.muon_steps,
        "muon_scale_mode": o.muon_scale_mode,
        "muon_extra_scale_factor": o.muon_scale,
        "muon_fp32_matmul_prec": "highest" if config.train.precision == "fp32" else "medium",  # medium is bf16
        "muon_tp_mode": "duplicated",  # over tp ranks the whole matrix, as without tp
    }


def mark(model: nn.Module, config: Config) -> None:
    """Tell Megatron, by the marks that it has for this, what is Adam's and which weights are several matrices in one.

    Each matrix that Hugging Face's format has is orthogonalised by itself: q, k and v, gate and up.
    """
    tp = config.parallel.tp
    layers = enumerate(family.layers(config.model))
    tensors = {at_layer(x, i).ours: x for i, layer in layers for x in layer.tensors}
    for name, parameter in global_parameters(model):
        found = tensors.get(name)
        if not name.endswith(".weight"):
            parameter.is_embedding_or_output_parameter = True  # type: ignore[attr-defined]
        elif isinstance(found, Heads):
            parameter.is_qkv = True  # type: ignore[attr-defined]
            cut = tp if found.heads == 1 else 1  # else a head's rows are all on one rank
            parameter.qkv_split_shapes = [rows // cut for _, rows in found.parts]  # type: ignore[attr-defined]


def number_steps(states: Any, parts: list[Any]) -> None:
    """Make the count of steps of the Adam beside Muon a number, in what is saved of `parts`.

    Megatron-Core 0.19.2 saves a tensor, which of a GPU a machine without one could not read, and leaves 0 out.
    """
    for part, found in zip(parts, states.values(), strict=True):
        if isinstance(part.optimizer, torch.optim.Adam):
            step = next(iter(part.optimizer.state.values()))["step"]
            found.get("optimizer", found)["state"]["common_step"] = float(step)
