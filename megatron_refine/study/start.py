"""Weights to start from: of a model that can soon learn to answer.

From the usual random weights a model of this size learned no recall in 550 steps. In these, the first head of each
layer is made to look up: the key of a word is that of the word before it, a query finds the keys that are like it, and
what is read comes out as the word that was written (an induction head, arXiv 2209.11895). Training does the rest.
"""

from pathlib import Path

import torch
from torch import Tensor

from megatron_refine.config import ModelConfig
from megatron_refine.convert.fields import CONFIG, fresh_config
from megatron_refine.convert.hf_folder import WEIGHTS
from megatron_refine.convert.hf_writer import FORMAT
from megatron_refine.convert.mapping import Converter
from megatron_refine.convert.tensorfile import Spec, TensorFileWriter
from megatron_refine.files import write_json

Weights = dict[str, Tensor]


def write_start(folder: Path, model: ModelConfig, seed: int) -> None:
    """Write a folder in Hugging Face's format. The model is a DeltaNet, or a Gated DeltaNet without an output gate."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = start(model, seed)
    specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()}
    writer = TensorFileWriter(folder / WEIGHTS, specs, FORMAT)
    for name, tensor in weights.items():
        writer.write(name, tensor)
    write_json(folder / CONFIG, fresh_config(model, "float32"))


def start(model: ModelConfig, seed: int) -> Weights:
    """Return all tensors by their names in Hugging Face's format, fp32."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: _random(name, shape, generator) for name, shape in Converter(model).hf_shapes.items()}
    weights["lm_head.weight"] = weights["model.embeddings.weight"] / 2
    heads: int = model.num_heads  # type: ignore[attr-defined]
    for layer in range(model.num_layers):
        _look_up(weights, f"model.layers.{layer}.attn.", heads)
    return weights


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    def normal(std: float) -> Tensor:
        return torch.randn(shape, generator=generator) * std

    match name.removesuffix(".weight").split(".")[-1].split("_")[-1]:
        case "norm" | "log":  # of a Gated DeltaNet, A = e
            return torch.ones(shape)
        case "bias":  # it hardly forgets
            return torch.full(shape, -8.0)
        case "embeddings":
            return normal(0.1)
        case "conv1d":
            taps = normal(0.2)
            taps[..., -1] += 1
            return taps
    return normal(shape[-1] ** -0.5 * (1.0 if name.endswith(("b_proj.weight", "down_proj.weight")) else 0.5))


def _look_up(weights: Weights, layer: str, heads: int) -> None:
    """Let the layer's first head copy the word that followed a like one."""
    q, k, v, o = (weights[f"{layer}{part}_proj.weight"] for part in "qkvo")
    wide, values = len(q) // heads, len(v) // heads
    q[:wide] *= 2
    k[:wide] = q[:wide]
    v[:values] *= 2
    o[:, :values] = v[:values].T
    taps = weights[f"{layer}k_conv1d.weight"]
    taps[:wide, 0, -2], taps[:wide, 0, -1] = 1, 0
