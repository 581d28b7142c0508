"""What a model costs: sums over its layers, and the frame around their mixers. Plain arithmetic.

A multiply-add counts 2 FLOPs. Norms, activations and short convolutions are no matmuls and are left out.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_refine.config import ModelConfig, Parallel
from megatron_refine.models import family
from megatron_refine.models.layer import Layer, MixerCost


def stage_layers(model: ModelConfig, parallel: Parallel, stage: int) -> Sequence[Layer]:
    """Return the layers of one pipeline stage."""
    counts = parallel.layers(model.num_layers)
    first = sum(counts[:stage])
    return family.layers(model)[first : first + counts[stage]]


def attending(model: ModelConfig) -> list[int]:
    """Return the numbers, from 0, of the layers of softmax attention."""
    return [i for i, layer in enumerate(family.layers(model)) if layer.cost.kernels == "softmax_attention"]


def request_bytes(model: ModelConfig, tp: int) -> int:
    """Count the bytes that a request's states take on each rank of a server, pages of keys and values aside."""
    serving = family.of(model.family).serving
    assert serving, "the configuration refuses other families"
    return (model.num_layers - len(attending(model))) * serving.slot(model, tp).bytes


def grouped(layers: Iterable[Layer]) -> list[tuple[Layer, int]]:
    """Return each layer once, with how often it stands there."""
    found: dict[int, tuple[Layer, int]] = {}
    for layer in layers:
        found[id(layer)] = (layer, found.get(id(layer), (layer, 0))[1] + 1)
    return list(found.values())


def parameters(model: ModelConfig) -> int:
    """Count the trained parameters of the whole model, vocabulary padding included."""
    return rank_parameters(model, Parallel(), stage=0)


def rank_parameters(model: ModelConfig, parallel: Parallel, stage: int) -> int:
    """Count the trained parameters of each tensor parallel rank of one pipeline stage.

    The vocabulary is sharded, norms are whole on every rank. The first stage has the embedding, the last one the final
    norm and the output layer (tied: a copy of the embedding, unless it has that already).
    """
    tp = parallel.tp
    assert model.tp_limit() % tp == 0
    first, last = stage == 0, stage == parallel.pp - 1
    table = model.padded_vocab * model.hidden_size
    own_output = last and not (model.tie_embeddings and first)
    layers = stage_layers(model, parallel, stage)
    cut = 3 * model.hidden_size * model.intermediate_size * len(layers) + table * (first + own_output)
    assert cut % tp == 0, "tp divides the MLP and the padded vocabulary"
    mixers = sum(layer.cost.parameters(tp) for layer in layers)
    return cut // tp + mixers + (2 * len(layers) + last) * model.hidden_size


def layer_flops(model: ModelConfig, layer: Layer, length: int, before: int = 0) -> dict[str, int]:
    """Forward FLOPs of a layer, a token of a stream of `length` tokens that follows `before` others, by matmul."""
    return layer.cost.flops(length, before) | {"mlp": 6 * model.hidden_size * model.intermediate_size}


def stack_flops(model: ModelConfig, length: int, before: int = 0) -> int:
    """Forward FLOPs of all layers, a token of a stream of `length` tokens that follows `before` others."""
    layers = grouped(family.layers(model))
    return sum(n * sum(layer_flops(model, layer, length, before).values()) for layer, n in layers)


def head_flops(model: ModelConfig) -> int:
    """Forward FLOPs of the output layer, a row."""
    return 2 * model.hidden_size * model.padded_vocab


@dataclass(frozen=True)
class Frame:
    """Bytes kept for the backward pass of a layer around its mixer, a row."""

    norms: float  # divided by cp, and by tp under sequence parallelism
    mlp: float  # divided by tp * cp


def saved_frame(model: ModelConfig, itemsize: int, gpu: bool) -> Frame:
    """Count them. On a GPU the norms and the gated MLP are one kernel each, which keeps its input."""
    norm = 2 if gpu else 3  # input and output; x / rms(x)
    mlp = 3 if gpu else 5  # gate, up, their product; gate again, SiLU(gate)
    return Frame(2 * norm * model.hidden_size * itemsize, mlp * model.intermediate_size * itemsize)


def operations(model: ModelConfig) -> dict[str, list[MixerCost]]:
    """Return, for each package of `kernels` that mixes sequences, the different shapes that the model has of it."""
    found: dict[str, list[MixerCost]] = {}
    for layer, _ in grouped(family.layers(model)):
        shapes = found.setdefault(layer.cost.kernels, [])
        if layer.cost not in shapes:
            shapes.append(layer.cost)
    return found
