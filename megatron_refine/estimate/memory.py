"""The bytes a rank holds at the peak of a step, by component; without fragmentation and communication buffers."""

from dataclasses import dataclass

from megatron_refine.config import Config
from megatron_refine.models import family

HEAD_ELEMENTS = 1 << 22  # logits that exist at a time: the head takes rows in chunks (trainer/head.py)
FP32 = 4


@dataclass(frozen=True)
class RankMemory:
    """Bytes by component of every tensor parallel rank of pipeline stage `stage`."""

    stage: int
    weights: int
    gradients: int  # fp32 in either precision
    optimizer: int  # Adam's moments and, in bf16, fp32 weights: this rank's share of the distributed optimizer
    activations: int  # kept for the backward pass
    head: int  # logits of one chunk of rows, their probabilities and their gradient
    states: int  # forked at the selected positions, and the rollouts' own while they decode

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.head + self.states


def fullest_rank(config: Config, dp: int) -> RankMemory:
    """The memory of the pipeline stage that holds most."""
    stages = (rank_memory(config, dp, stage) for stage in range(config.parallel.pp))
    return max(stages, key=lambda memory: memory.total)


def rank_memory(config: Config, dp: int, stage: int) -> RankMemory:
    """The memory of a rank of pipeline stage `stage`, with `dp` data parallel ranks."""
    p = config.parallel
    count = family.flops(config.model.family).rank_parameters(config.model, p.tp, p.pp, stage)
    bf16 = config.train.precision == "bf16"
    last = stage == p.pp - 1
    return RankMemory(
        stage=stage,
        weights=count * _itemsize(config),
        gradients=count * FP32,
        optimizer=count * (12 if bf16 else 8) // dp,
        activations=_activations(config, dp, stage),
        head=_head(config) if last else 0,
        states=_states(config) if config.refine.enabled else 0,
    )


def _itemsize(config: Config) -> int:
    return 2 if config.train.precision == "bf16" else FP32


def _rows(config: Config) -> int:
    """Rows of a micro-batch: main tokens and, packed behind them, the rollouts' tokens."""
    branch = config.branch_rows if config.refine.enabled else 0
    return config.train.micro_batch_size * (config.data.seq_length + branch)


def _activations(config: Config, dp: int, stage: int) -> int:
    """Recomputation keeps each layer's input and, at its turn, everything of one layer. Under 1F1B (arXiv 2104.04473) a
    stage holds one micro-batch more for each stage that follows."""
    p, model, itemsize = config.parallel, config.model, _itemsize(config)
    split_rows = p.tp if p.sp else 1
    saved = family.flops(model.family).saved_bytes(model, itemsize)
    layer = saved.rows // split_rows + saved.heads // p.tp
    layers, layer_input = model.num_layers // p.pp, model.hidden_size * itemsize // split_rows
    in_flight = min(p.pp - stage, config.train.global_batch_size // (dp * config.train.micro_batch_size))
    ends = 2 * layer_input if stage == p.pp - 1 else 0  # input and output of the final norm
    if config.train.recompute == "full":
        return _rows(config) * (in_flight * layers * layer_input + layer + ends)
    return _rows(config) * (in_flight * layers * layer + ends)


def _head(config: Config) -> int:
    vocab = config.model.padded_vocab // config.parallel.tp
    return 3 * min(HEAD_ELEMENTS, _rows(config) * vocab) * FP32


def _states(config: Config) -> int:
    """The state at each of the B c positions, and one for each of their n rollouts."""
    r, model = config.refine, config.model
    positions = config.train.micro_batch_size * r.num_chunks
    layer = family.flops(model.family).state_bytes(model, _itemsize(config)) // config.parallel.tp
    return positions * (1 + r.num_rollouts) * model.num_layers // config.parallel.pp * layer
