"""How long a step takes: matmuls at a share of the peak, collectives by latency and bandwidth, decoding by memory.

A range, from Hardware.slow to Hardware.fast: nothing here was measured on the machine that it speaks of.
"""

from dataclasses import dataclass

from megatron_refine.config import Config
from megatron_refine.estimate.flops import StepFlops, step_flops
from megatron_refine.estimate.hardware import Hardware
from megatron_refine.estimate.memory import itemsize, recomputed
from megatron_refine.estimate.overlap import hidden_seconds
from megatron_refine.estimate.traffic import Traffic, step_traffic
from megatron_refine.models import cost, family

KERNELS = 25  # a layer's in a step of decoding
HIDDEN = "of these beside passes"  # collectives, as a negative number of seconds


@dataclass(frozen=True)
class StepTime:
    """Seconds of a batch, (at best, at worst)."""

    stages: dict[str, tuple[float, float]]  # score, rollout, rescore, update, collectives, HIDDEN, sync
    ntp: tuple[float, float]  # a step of next-token prediction alone
    exchanged: dict[tuple[str, str], float]  # (axis, operation) -> seconds of its collectives

    @property
    def total(self) -> tuple[float, float]:
        best, worst = zip(*self.stages.values(), strict=True)
        return sum(best), sum(worst)


def step_time(config: Config, dp: int, hardware: Hardware) -> StepTime:
    """Estimate the step of the pipeline stage that takes longest: the last, which has the head."""
    work = step_flops(config)
    plain = StepFlops(ntp=work.ntp, score=0, rollout=0, rescore=0, update=work.ntp)
    refine = config.refine.enabled
    exchanged = _exchanged(config, dp, hardware, refine)
    stages = _computing(config, dp, hardware, work if refine else plain, refine)
    stages |= _collectives(config, dp, hardware, refine, exchanged)
    if config.engine.kind == "sglang" and refine:
        stages["sync"] = sync_seconds(config, hardware)
    others = _collectives(config, dp, hardware, False, _exchanged(config, dp, hardware, refine=False))
    alone = StepTime(_computing(config, dp, hardware, plain, refine=False) | others, (0.0, 0.0), {})
    return StepTime(stages, alone.total, exchanged)


def _exchanged(config: Config, dp: int, hardware: Hardware, refine: bool) -> dict[tuple[str, str], float]:
    """Seconds of a batch's collectives, by axis and operation."""
    found: dict[tuple[str, str], float] = {}
    for each in step_traffic(config, dp, refine, config.parallel.pp - 1):
        key = each.axis, each.op
        found[key] = found.get(key, 0.0) + collective_seconds(config, dp, hardware, each)
    return found


def _collectives(
    config: Config, dp: int, hardware: Hardware, refine: bool, exchanged: dict[tuple[str, str], float]
) -> dict[str, tuple[float, float]]:
    found = {"collectives": (sum(exchanged.values()),) * 2}
    updates = config.train.global_batch_size // config.mini_batch_at(config.refine.start_step, refine)
    forward = _busy(config, dp, hardware, step_flops(config).ntp / 3 / _micros(config, dp))
    best, worst = (hidden_seconds(config, updates, refine, exchanged, seconds) for seconds in forward)
    return found | ({HIDDEN: (-best, -worst)} if worst else {})


def _micros(config: Config, dp: int) -> int:
    """Micro-batches of a batch on a rank."""
    return config.train.global_batch_size // (dp * config.train.micro_batch_size)


def _busy(config: Config, dp: int, hardware: Hardware, flops: float) -> tuple[float, float]:
    """Seconds, at best and at worst, in which the slowest pipeline stage does its part of the FLOPs."""
    seconds = flops * _fullest_stage(config) / (dp * config.parallel.model_size) / hardware.peak(config.train.precision)
    return seconds / hardware.fast, seconds / hardware.slow


def _computing(
    config: Config, dp: int, hardware: Hardware, work: StepFlops, refine: bool
) -> dict[str, tuple[float, float]]:
    p, micros = config.parallel, _micros(config, dp)
    updates = config.train.global_batch_size // config.mini_batch_at(config.refine.start_step, refine)
    each = max(1, micros // updates)  # micro-batches of an optimizer step

    def seconds(flops: float, bubble: float) -> tuple[float, float]:
        return _busy(config, dp, hardware, flops * bubble)

    wave = min(p.pp, micros)  # micro-batches that follow one another through the stages
    passing = (wave + p.pp - 1) / wave
    backward = (each + p.pp - 1) / each  # 1F1B
    passes = 2 if config.fused and refine else 3  # of an update: backward, backward and forward
    again = 1 + recomputed_share(config) / passes
    found = {"update": seconds(work.update * again, backward)}
    if refine:
        found |= {"score": seconds(work.score, passing), "rescore": seconds(work.rescore, passing)}
        if config.engine.kind == "native":
            found["rollout"] = _decoding(config, micros, hardware)
    return found


def recomputed_share(config: Config) -> float:
    """Return the share of a layer's forward pass that the backward pass runs again."""
    model, length = config.model, config.data.seq_length
    mlp = sum(cost.layer_flops(model, x, length)["mlp"] for x in family.layers(model)) / cost.stack_flops(model, length)
    return sum({"mlp": mlp, "mixer": 1 - mlp}[name] for name in recomputed(config))


def _decoding(config: Config, micros: int, hardware: Hardware) -> tuple[float, float]:
    """A token of all branches: this rank's weights are read, or its kernels started, whichever takes longer."""
    p, model = config.parallel, config.model
    weights = cost.rank_parameters(model, p, p.pp - 1) * itemsize(config)
    reading = weights / hardware.memory_bandwidth
    starting = KERNELS * model.num_layers / p.pp * hardware.launch * (0.1 if config.cuda_graphs else 1.0)
    steps = micros * config.refine.rollout_len * (2 * p.pp - 1 if p.pp > 1 else 1)
    return steps * max(reading, starting / 2), steps * (reading + starting)


def _fullest_stage(config: Config) -> float:
    """Work of the pipeline stage that has most of it / the mean."""
    model, length, parallel = config.model, config.data.seq_length, config.parallel
    if parallel.pp == 1:
        return 1.0

    def work(stage: int) -> float:
        own = cost.grouped(cost.stage_layers(model, parallel, stage))
        layers = sum(n * sum(cost.layer_flops(model, layer, length).values()) for layer, n in own)
        return layers + cost.head_flops(model) * (stage == parallel.pp - 1)

    each = [work(stage) for stage in range(parallel.pp)]
    return max(each) * parallel.pp / sum(each)


def collective_seconds(config: Config, dp: int, hardware: Hardware, traffic: Traffic) -> float:
    """alpha-beta: ring collectives over w ranks move (w-1)/w of the tensor in w-1 hops, an all-reduce twice that."""
    size, spread = _spread(config, dp, traffic.axis)
    inside = spread <= hardware.gpus_per_node
    latency = hardware.node_latency if inside else hardware.network_latency
    bandwidth = (hardware.node_bandwidth if inside else hardware.network_bandwidth) * hardware.reached_bandwidth
    if traffic.op in ("send", "broadcast"):
        return traffic.calls * latency + traffic.size / bandwidth
    rounds = 2 if traffic.op == "all_reduce" else 1
    hops = rounds * (size - 1) if traffic.op != "all_to_all" else 1  # pairs exchange at once
    return traffic.calls * hops * latency + rounds * traffic.size * (size - 1) / size / bandwidth


def _spread(config: Config, dp: int, axis: str) -> tuple[int, int]:
    """Ranks of a group, and how many neighbouring ranks it lies in: tp innermost, then cp, dp and pp, as Megatron."""
    p = config.parallel
    if axis == "tp":
        return p.tp, p.tp
    if axis == "cp":
        return p.cp, p.tp * p.cp
    if axis == "dp":
        return dp * p.cp, p.tp * p.cp * dp
    return p.pp, p.tp * p.cp * dp * p.pp


def sync_seconds(config: Config, hardware: Hardware) -> tuple[float, float]:
    """The weights, broadcast to the servers over the network: at a link's share, and at a third of that."""
    weights = cost.parameters(config.model) * itemsize(config)
    best = weights / (hardware.network_bandwidth * hardware.reached_bandwidth)
    return best, 3 * best
