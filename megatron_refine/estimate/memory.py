"""The bytes a rank holds at the peak of a step, by component; without fragmentation and communication buffers."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_refine.config import Config
from megatron_refine.models import cost, family
from megatron_refine.models.hf import Heads
from megatron_refine.models.layer import Layer

# logits that exist at a time (trainer/head.py): in chunks of rows; on a GPU all of them, up to the second number
HEAD_ELEMENTS, GPU_HEAD_ELEMENTS = 1 << 22, (1 << 26, 1 << 29)
FP32 = 4


@dataclass(frozen=True)
class RankMemory:
    """Bytes by component of every tensor parallel rank of pipeline stage `stage`."""

    stage: int
    weights: int
    gradients: int  # fp32 in either precision
    optimizer: int  # moments and, in bf16, fp32 weights: of Adam this rank's share, of Muon all
    activations: int  # kept for the backward pass, or by the handles of a score pass, whichever is more
    head: int  # logits of a chunk of rows and their gradient; in fp32, the sum of the weight's over several chunks
    states: int  # forked at the selected positions, and the rollouts' own while they decode

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.head + self.states


def fullest_rank(config: Config, dp: int, gpu: bool = True) -> RankMemory:
    """The memory of the pipeline stage that holds most."""
    stages = (rank_memory(config, dp, stage, gpu) for stage in range(config.parallel.pp))
    return max(stages, key=lambda memory: memory.total)


def rank_memory(config: Config, dp: int, stage: int, gpu: bool = True) -> RankMemory:
    """The memory of a rank of pipeline stage `stage`, with `dp` data parallel ranks. gpu: by the kernels of a GPU; else
    by torch on a CPU."""
    p = config.parallel
    count = cost.rank_parameters(config.model, p, stage)
    bf16 = config.train.precision == "bf16"
    last = stage == p.pp - 1
    return RankMemory(
        stage=stage,
        weights=count * itemsize(config),
        gradients=count * FP32,
        optimizer=_optimizer(config, count * (12 if bf16 else 8), dp),
        activations=max(_activations(config, dp, stage, gpu), handles(config, dp, stage, gpu)),
        head=_head(config, gpu) if last else 0,
        states=_states(config, stage) if config.refine.enabled else 0,
    )


def _optimizer(config: Config, adam: int, dp: int) -> int:
    """Bytes of moments and fp32 weights, of which Adam would need `adam`. Muon has one moment of the matrices of linear
    layers, Adam two."""
    p = config.parallel
    if config.optimizer.distributed:
        return adam // (dp * p.cp)
    _, weights = muon_matrices(family.layers(config.model))
    return adam - FP32 * weights // (p.pp * p.tp)


def muon_matrices(layers: Iterable[Layer]) -> tuple[int, int]:
    """Return what Muon updates of these layers: matrices, and weights in them, over all ranks."""
    found = [x for layer in layers for x in layer.tensors if x.ours.endswith(".weight") and len(x.shape) == 2]
    return sum(len(x.parts) if isinstance(x, Heads) else 1 for x in found), sum(math.prod(x.shape) for x in found)


def itemsize(config: Config) -> int:
    """Bytes of a weight or an activation."""
    return 2 if config.train.precision == "bf16" else FP32


def _rows(config: Config) -> int:
    """Rows of a micro-batch: main tokens and, packed behind them, the rollouts' tokens."""
    branch = config.branch_rows if config.refine.enabled else 0
    return config.train.micro_batch_size * (config.data.seq_length + branch)


def _activations(config: Config, dp: int, stage: int, gpu: bool) -> int:
    """Recomputation keeps each layer's input and, at its turn, everything of one layer. Under 1F1B (arXiv 2104.04473) a
    stage holds one micro-batch more for each stage that follows."""
    p, model, size = config.parallel, config.model, itemsize(config)
    cut = p.cp * (p.tp if p.sp else 1)  # of whole rows
    layers = cost.grouped(cost.stage_layers(model, p, stage))
    modules = [(module_bytes(config, layer, gpu), count) for layer, count in layers]
    layer_input = _rows(config) * model.hidden_size * size / cut
    in_flight = min(p.pp - stage, _update_size(config) // (dp * config.train.micro_batch_size))
    ends = 0.0
    if stage == p.pp - 1:  # the final norm, as those of the layers; what it returns is gathered over tp
        ends = layer_input * (1 if gpu else 2) + _rows(config) * model.hidden_size * size / p.cp
    if config.train.recompute == "full":
        inputs = layer_input * sum(count for _, count in layers)
        return round(in_flight * inputs + max(sum(found.values()) for found, _ in modules) + ends)
    names = recomputed(config)
    kept = sum(count * size for found, count in modules for name, size in found.items() if name not in names)
    again = max((found[name] for found, _ in modules for name in names), default=0)
    return round(in_flight * kept + again + ends)


def _update_size(config: Config) -> int:
    """Sequences of the run's largest optimizer step, which is what the pipeline is fed at once: a batch where there are
    steps without REFINE or on answers, a mini-batch else."""
    start = config.refine.start_step
    if start or config.train.phase == "posttrain":
        return config.train.global_batch_size
    return config.mini_batch_at(start, config.refine.enabled)


def handles(config: Config, dp: int, stage: int, gpu: bool) -> int:
    """Bytes of the handles of a two-pass update's score pass, of the micro-batches that are in the pipeline at once. A
    fused update keeps the same tensors for its backward pass."""
    if not config.refine.enabled or config.fused:
        return 0
    p, model, length = config.parallel, config.model, config.data.seq_length
    own = cost.stage_layers(model, p, stage)
    row = sum(layer.cost.handle_bytes(itemsize(config), length, gpu, p.cp) for layer in own)
    wave = min(p.pp, config.train.global_batch_size // (dp * config.train.micro_batch_size))
    return round(wave * config.train.micro_batch_size * length * row / (p.tp * p.cp))


def recomputed(config: Config) -> list[str]:
    """The modules that the backward pass runs again, one after the other: `mixer`, `mlp`."""
    modules = {"none": (), "selective": config.train.recompute_modules, "full": ("mixer", "mlp")}
    return list(dict.fromkeys(modules[config.train.recompute]))


def module_bytes(config: Config, layer: Layer, gpu: bool) -> dict[str, float]:
    """Bytes kept for the backward pass of a layer and micro-batch, branches included: `norms`, `mixer`, `mlp`."""
    p, r, micro, length = config.parallel, config.refine, config.train.micro_batch_size, config.data.seq_length
    saved = layer.cost.saved_bytes(itemsize(config), length, gpu)
    frame = cost.saved_frame(config.model, itemsize(config), gpu)
    rows, shards = _rows(config), p.tp * p.cp
    mixer = rows * (saved.heads + saved.travelled * (p.cp > 1))
    if r.enabled:
        mixer += micro * r.num_chunks * (saved.position + r.num_rollouts * saved.rollout)
    norms = rows * frame.norms / (p.cp * (p.tp if p.sp else 1))
    return {"norms": norms, "mixer": mixer / shards + saved.fixed, "mlp": rows * frame.mlp / shards}


def _head(config: Config, gpu: bool) -> int:
    vocab, rows = config.model.padded_vocab // config.parallel.tp, _rows(config) // config.parallel.cp
    if not gpu:
        return 3 * min(HEAD_ELEMENTS, rows * vocab) * FP32
    chunk, kept = GPU_HEAD_ELEMENTS
    if rows * vocab <= kept:
        return 2 * rows * vocab * itemsize(config)
    return 2 * chunk * itemsize(config) + vocab * config.model.hidden_size * FP32


def _states(config: Config, stage: int) -> int:
    """The state at each of the B c positions, and one for each of their n rollouts."""
    r, model = config.refine, config.model
    positions = config.train.micro_batch_size * r.num_chunks
    p = config.parallel
    own = sum(layer.cost.state_bytes(itemsize(config)) for layer in cost.stage_layers(model, p, stage))
    return positions * (1 + r.num_rollouts) * (own // (p.tp * p.cp))
