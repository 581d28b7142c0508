"""Checks that take several keys, or a key and the number of ranks."""

import os
import re
from collections.abc import Iterator

from megatron_refine.config.base import ConfigError, LayoutError
from megatron_refine.config.schema import Config


def check_world_size(config: Config, world_size: int) -> int:
    """Return the data-parallel size of `world_size` ranks. Raises ConfigError where they do not fit the layout."""
    p = config.parallel
    if world_size < 1 or world_size % p.model_size:
        raise ConfigError(
            f"world size {world_size} is no multiple of tp*cp*pp = {p.tp}*{p.cp}*{p.pp} = {p.model_size}: "
            f"start a multiple of {p.model_size} processes or change parallel.*"
        )
    dp = world_size // p.model_size
    sequences = config.mini_batch_size
    if sequences % (dp * config.train.micro_batch_size):
        key = "update.mini_batch_size" if config.update.mini_batch_size else "train.global_batch_size"
        raise LayoutError(
            f"{key}={sequences} is no multiple of dp*train.micro_batch_size = {dp}*{config.train.micro_batch_size}: "
            "change one of them or the number of processes",
            "the batch does not divide by dp",
        )
    return dp


def cross_check(c: Config) -> Config:
    """Return the configuration as it is. Raises ConfigError for contradictions between its keys, LayoutError where the
    layout has one."""
    layout = [(message, rule) for wrong, message, rule in _layout_problems(c) if wrong]
    problems = (*_training_problems(c), *_phase_problems(c), *_engine_problems(c))
    found = [*(message for message, _ in layout), *(message for wrong, message in problems if wrong)]
    if layout:
        raise LayoutError("\n".join(found), layout[0][1])
    if found:
        raise ConfigError("\n".join(found))
    return c


def _layout_problems(c: Config) -> Iterator[tuple[bool, str, str]]:
    """Whether it is one, what to say, and which rule it breaks."""
    p, heads = c.parallel, c.model.tp_limit()
    allowed = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
    cut = "tp*cp does not divide the heads"
    yield (
        heads % p.tp != 0,
        f"parallel.tp={p.tp}: must divide the {heads} heads of the model; choose one of {allowed}",
        cut,
    )
    yield (
        heads % p.tp == 0 and heads % (p.tp * p.cp) != 0,
        f"parallel.cp={p.cp}: tp*cp = {p.tp * p.cp} must divide the {heads} heads of the model, which context "
        f"parallelism shards around every mixer; choose tp*cp of {allowed}",
        cut,
    )
    width, vocab, layers = c.model.intermediate_size, c.model.padded_vocab, c.model.num_layers
    yield (
        width % p.tp != 0,
        f"parallel.tp={p.tp}: must divide model.intermediate_size={width}; change either",
        "tp does not divide the MLP",
    )
    yield (
        vocab % p.tp != 0,
        f"parallel.tp={p.tp}: must divide the vocabulary, padded to {vocab}; change either",
        "tp does not divide the vocabulary",
    )
    yield (
        not p.stages and layers % p.pp != 0,
        f"parallel.pp={p.pp}: must divide model.num_layers={layers}; change either, or set parallel.stages",
        "pp does not divide the layers",
    )
    yield (
        bool(p.stages) and (len(p.stages), sum(p.stages)) != (p.pp, layers),
        f"parallel.stages={p.stages}: must be {p.pp} numbers (parallel.pp) that add up to {layers} (model.num_layers)",
        "the stages do not make up the layers",
    )
    yield (
        p.sp and p.tp == 1,
        "parallel.sp=true: sequence parallelism needs parallel.tp > 1; set parallel.sp=false",
        "sp without tp",
    )
    yield (
        p.pp > 1 and c.update.mode == "fused",
        f"update.mode=fused: parallel.pp={p.pp} interleaves the passes of micro-batches, kept graphs need them in "
        "turn; set update.mode=two_pass",
        "a fused update with pp",
    )


def _training_problems(c: Config) -> Iterator[tuple[bool, str]]:
    batch, mini = c.train.global_batch_size, c.mini_batch_size
    yield (
        batch % mini != 0,
        f"update.mini_batch_size={mini}: must divide train.global_batch_size={batch}; change either",
    )
    yield (
        c.update.mode == "fused" and mini != batch,
        (
            "update.mode=fused: the kept graphs serve one optimizer step a batch; set update.mini_batch_size=0 or "
            "update.mode=two_pass"
        ),
    )
    yield (
        c.refine.group == "position" and c.refine.num_rollouts == 1,
        (
            "refine.group=position: with refine.num_rollouts=1 a group is one rollout, which has no baseline; set "
            "refine.num_rollouts=2 or more, or refine.group=sequence"
        ),
    )
    length, needed = c.data.seq_length, c.shortest_refine_row
    yield (
        c.refine.enabled and length < needed,
        (
            f"data.seq_length={length}: too short for refine.num_chunks={c.refine.num_chunks} positions with "
            f"refine.margin={c.refine.margin} and refine.rollout_len={c.refine.rollout_len}; set at least {needed}"
        ),
    )
    yield (
        c.data.min_length > length,
        (f"data.min_length={c.data.min_length}: exceeds data.seq_length={length}; 0 means data.seq_length"),
    )
    yield (
        c.data.valid_min_length > length,
        f"data.valid_min_length={c.data.valid_min_length}: exceeds data.seq_length={length}; 0 means data.min_length",
    )
    start, steps = c.refine.start_step, c.train.steps
    yield (
        c.refine.enabled and start > steps,
        (f"refine.start_step={start}: exceeds train.steps={steps}; set refine.enabled=false for NTP only"),
    )
    low, high = c.optimizer.min_lr, c.optimizer.lr
    yield low > high, f"optimizer.min_lr={low}: exceeds optimizer.lr={high}; lower it"


def _phase_problems(c: Config) -> Iterator[tuple[bool, str]]:
    phase, match = c.train.phase, c.train.match
    yield (
        match != "data" and c.refine.enabled,
        f"train.match={match}: is for baselines; set refine.enabled=false with it, or leave it out",
    )
    if phase == "midtrain":
        yield bool(c.task.paths), "task.paths: midtrain trains on data.paths; set train.phase=posttrain or testtime"
        return
    yield (
        phase == "testtime" and (c.optimizer.schedule != "constant" or c.optimizer.warmup_steps > 0),
        f"optimizer.schedule={c.optimizer.schedule}, optimizer.warmup_steps={c.optimizer.warmup_steps}: test-time "
        "training has one rate for all batches; set optimizer.schedule=constant optimizer.warmup_steps=0",
    )
    plain = phase == "posttrain" and not c.task.inner_step
    yield (
        plain and c.refine.enabled,
        "task.inner_step=false: leaves nothing for REFINE to do; set refine.enabled=false for plain SFT",
    )
    yield (
        plain and match == "optimizer_steps",
        "train.match=optimizer_steps: plain SFT has one optimizer step a batch; choose data or compute",
    )


def _engine_problems(c: Config) -> Iterator[tuple[bool, str]]:
    e = c.engine
    yield (
        e.cuda_graphs == "true" and (e.kind != "native" or c.parallel.pp > 1),
        "engine.cuda_graphs=true: is for engine.kind=native at parallel.pp=1; leave it out",
    )
    if e.kind == "native":
        yield e.offload, "engine.offload=true: makes room for servers, and engine.kind=native has none; leave it out"
        yield e.lag > 0, "engine.lag=1: is for servers that write beside the training; set engine.lag=0"
        return
    yield (
        e.lag > 0 and not e.importance_cap,
        "engine.lag=1: rollouts of older weights need importance weights; set engine.importance_cap=2",
    )
    yield e.lag > 0 and e.offload, "engine.lag=1: servers write during the update, engine.offload=true before; drop one"
    yield (
        e.lag > 0 and c.train.phase == "testtime",
        "engine.lag=1: train.phase=testtime learns from each batch before it reads the next; set engine.lag=0",
    )
    yield (
        not c.model.served,
        f"engine.kind=sglang: SGLang does not serve model.family={c.model.family}; set engine.kind=native",
    )
    yield (
        not e.urls and not e.python,
        "engine.kind=sglang: needs engine.python, the interpreter of an environment with SGLang, or engine.urls",
    )
    yield (
        bool(e.urls and e.python),
        "engine.urls: servers that run already are not launched; remove engine.python",
    )
    bad = [url for url in e.urls if not re.fullmatch(r"https?://[^/\s]+", url)]
    yield bool(bad), f"engine.urls: {', '.join(bad)}: write http://host:port"
    heads = c.model.tp_limit()
    yield heads % e.tp != 0, f"engine.tp={e.tp}: must divide the {heads} heads of the model"
    key = e.api_key_env
    yield bool(key) and not os.environ.get(key), f"engine.api_key_env={key}: is not set; export {key}=..."
