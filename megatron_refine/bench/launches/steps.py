"""NTP, fused and two-pass steps of one micro-batch, counted: the passes, forward and backward.

Layers are alike, so two of them and one are run, and their difference stands for each further layer. What the host
reads decides how a step goes on, and fake tensors have no values: rollouts start at evenly spaced positions.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_refine.bench.launches import delta
from megatron_refine.bench.launches.counter import Answers, Counter, Key, Sum
from megatron_refine.bench.launches.opaque import compiler, recorder, rms_norm
from megatron_refine.config import Config, ConfigError
from megatron_refine.platform import hardware
from megatron_refine.records import Batch, Output

KINDS = {"ntp": None, "fused": "fused", "two_pass": "two_pass"}
OTHER = {True: "step by step", False: "as graphs"}
ODD = 37  # rows that a position lies off the grid of chunks


@dataclass
class Counted:
    """Of one step."""

    sums: dict[Key, Sum] = field(default_factory=dict)
    reads: list[tuple[str, str]] = field(default_factory=list)  # stage, place: of two layers

    def total(self, stages: Sequence[str] | None = None) -> Sum:
        """Over all stages, or some."""
        found = Sum()
        for (stage, *_), each in self.sums.items():
            if stages is None or stage in stages:
                found.add(each)
        return found


def count(config: Config, other: bool) -> dict[str, Counted]:
    """Count one micro-batch of `config` on one rank, by kind of step; then an "update". With `other` the fused step too
    with rollouts the other way, "step by step" or "as graphs".

    The process pretends to have a GPU from then on. Raises ConfigError for a layout of several ranks.
    """
    steps, graphs = Steps(config), config.cuda_graphs
    found = {OTHER[graphs]: steps.count(["fused"], not graphs)["fused"]} if other else {}
    return steps.count(tuple(KINDS), graphs) | {"update": steps.update()} | found


class Steps:
    """Builds models of one and two layers, and counts their steps."""

    def __init__(self, config: Config):
        p = config.parallel
        if p.tp * p.cp * p.pp > 1:
            raise ConfigError("launches: counts one rank; set parallel.tp=1 parallel.cp=1 parallel.pp=1")
        size = config.train.micro_batch_size
        train = config.train.model_copy(update={"global_batch_size": size})
        update = config.update.model_copy(update={"mini_batch_size": 0})
        engine = config.engine.model_copy(update={"stop_gap": math.inf})  # log-probabilities are any
        self.config = config.model_copy(update={"train": train, "update": update, "engine": engine})
        self.counter = Counter()
        hardware.pretend_gpu(compiler(self.counter), recorder(self.counter))
        delta.install(self.counter)
        from torch._subclasses.fake_tensor import FakeTensorMode

        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        from megatron_refine.platform.megatron.install import install

        install()
        from megatron_refine.trainer.parallel import init_parallel

        self.ranks = init_parallel(self.config)

    def count(self, kinds: Sequence[str], cuda_graphs: bool = False) -> dict[str, Counted]:
        """Of steps of the whole model."""
        with self.counting():
            one, two = (self._prepared(layers, kinds, cuda_graphs) for layers in (1, 2))
            next(iter(one.values()))()  # masks and tables that are made once
            if cuda_graphs:  # and recordings
                one["fused"]()
                two["fused"]()
            found = {}
            for kind in kinds:
                first, second = self._counted(one[kind]), self._counted(two[kind])
                found[kind] = extrapolated(first, second, self.config.model.num_layers)
        return found

    @contextmanager
    def counting(self) -> Iterator[None]:
        """All tensors made inside are fake."""
        with self.fake, self.counter, Answers(self.counter, {"rms_norm": partial(rms_norm, self.counter)}):
            yield

    def _prepared(self, layers: int, kinds: Sequence[str], cuda_graphs: bool) -> dict[str, Callable[[], Any]]:
        from megatron_refine.engine.native import NativeEngine

        model_config = self.config.model.model_copy(update={"num_layers": layers})
        config = self.config.model_copy(update={"model": model_config})
        model = self.build(config)
        engine, batch = NativeEngine(model, cuda_graphs), self._batch()

        def prepared(kind: str) -> Callable[[], Any]:
            update = config.update.model_copy(update={"mode": KINDS[kind] or "auto"})
            own = config.model_copy(update={"update": update})
            step = known_step(own, model, engine, Passes(model, self.counter), self.ranks, self.counter)
            return lambda: step(batch, 0, refine=KINDS[kind] is not None)

        return {kind: prepared(kind) for kind in kinds}

    def build(self, config: Config) -> torch.nn.Module:
        """The model, without what wraps it for data parallelism."""
        from megatron_refine.trainer.model import build_module

        return build_module(config, self.ranks)

    def update(self) -> Counted:
        """Of what follows the passes, once an optimizer step: gradients into their buffer, the norm, clipping, Adam.

        Of the whole model: kernels that take many parameters do not grow layer by layer.
        """
        from megatron_refine.step.refine import Item
        from megatron_refine.trainer.model import build_model
        from megatron_refine.trainer.optimizer import Updater

        with self.counting():
            model = build_model(self.config, self.ranks)
        updater = Updater(self.config, model, self.ranks)  # ranks exchange objects there, whose values must be
        with self.counting():
            item = Item(self._batch(), 0, torch.ones(()), torch.ones(()))
            length = self.config.data.seq_length

            def run() -> None:
                with self.counter("update"):
                    updater.update([item], _touch, _alone, length, 1)

            run()
            return self._counted(run)

    def _batch(self) -> Batch:
        size, length = self.config.train.micro_batch_size, self.config.data.seq_length
        tokens = torch.empty(size, length, dtype=torch.int64)
        return Batch(tokens, *(torch.empty(size, dtype=torch.int64) for _ in range(2)))

    def _counted(self, run: Callable[[], Any]) -> Counted:
        self.counter.clear()
        run()
        return Counted(self.counter.sums, [*self.counter.reads])


def extrapolated(one: Counted, two: Counted, layers: int) -> Counted:
    """Of `layers` layers: what one and two of them take differs by a layer."""
    found: dict[Key, Sum] = {}
    for key in (one.sums | two.sums).keys():
        found[key] = Sum()
        found[key].add(two.sums.get(key, Sum()), layers - 1)
        found[key].add(one.sums.get(key, Sum()), 2 - layers)
    return Counted(found, two.reads)


def known_step(config: Config, model: Any, engine: Any, updater: Any, ranks: Any, counter: Counter) -> Any:
    """A RefineStep whose positions the host knows, and whose clock is the counter."""
    from megatron_refine.step.refine import RefineStep

    class Known(RefineStep):
        def _select(self, batch: Batch, entropy: Tensor, step: int) -> Tensor:
            positions = super()._select(batch, entropy, step)
            size, length = batch.tokens.shape
            counter.know(positions, evenly(size, config.refine.num_chunks, length, config.refine.rollout_len))
            return positions

    step = Known(config, model, engine, updater, ranks)
    step.clock = counter  # type: ignore[assignment]
    return step


def evenly(batch: int, chunks: int, length: int, rollout: int) -> list[int]:
    """Positions in the middle of each chunk of the sequence, off any grid, with room for a rollout."""
    own = [min(length * (2 * i + 1) // (2 * chunks) + ODD, length - rollout) for i in range(chunks)]
    return own * batch


class _Touched(torch.autograd.Function):
    """A number that depends on all parameters; their gradients cost nothing."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return parameters[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.parameters)


def _touch(model: torch.nn.Module, item: Any) -> Output:
    return Output(_Touched.apply(*model.parameters()))


def _alone(output: Output, item: Any) -> tuple[Tensor, Tensor]:
    assert output.main is not None
    return output.main, output.main[None]


class Passes:
    """Stands where the optimizer does: forward and backward of each micro-batch, and nothing after."""

    lr = 0.0

    def __init__(self, model: torch.nn.Module, counter: Counter):
        self.model, self.counter = model, counter

    def update(self, items: Sequence[Any], forward: Any, loss: Any, num_rows: int, num_sums: int) -> Any:
        from megatron_refine.trainer.optimizer import UpdateResult

        collected = []
        for item in items:
            with self.counter("forward"):
                value, sums = loss(forward(self.model, item), item)
            with self.counter("backward"):
                value.backward()
            collected.append(sums.detach().double())
            for parameter in self.model.parameters():
                parameter.grad = None
        return UpdateResult(torch.stack(collected).sum(0).tolist(), 1.0, False)

    def advance_schedule(self) -> None:
        """There is none."""
