"""Test-time training: a REFINE step on the prompts of each test batch, then their answers (arXiv 2602.16704, 3.4).

No label is used. By default every batch starts from the same weights, so that no answer depends on the batches before.
"""

import math
from typing import Any

import torch

from megatron_refine.checkpoint.checkpoints import Progress
from megatron_refine.config import Config
from megatron_refine.data.order import rank_samples
from megatron_refine.data.prompts import Prompts
from megatron_refine.estimate.flops import matched_ratio
from megatron_refine.eval.answers import Answerer
from megatron_refine.eval.suite import Prediction, predictions, questions
from megatron_refine.step.refine import RefineStep


class TestTime:
    """One pass over the prompts, in the order of the files; the last batch may be a part of one."""

    __test__ = False  # pytest takes the name for that of tests

    def __init__(
        self, config: Config, prompts: Prompts, step: RefineStep, answerer: Answerer, device: torch.device
    ):  # fmt: skip
        self.config, self.prompts, self.step, self.answerer, self.device = config, prompts, step, answerer, device
        self.num_samples: int | None = len(prompts)
        self.total_steps = math.ceil(len(prompts) / config.train.global_batch_size)
        self.fingerprint = prompts.fingerprint
        self.base: list[torch.Tensor] | None = None  # the weights that every batch starts from
        self.predictions: list[Prediction] = []  # of the last batch

    def __call__(self, done: Progress, refine: bool) -> dict[str, Any]:
        """One batch on this rank. Returns its metrics; `predictions` are those of all ranks."""
        if self.config.resets and self.base is None:
            self.base = self.step.updater.weights()
        first = done.consumed_samples
        rows = range(first, min(first + self.config.train.global_batch_size, len(self.prompts)))
        metrics = self._learn(rows, done.step, refine) | self._answer(rows)
        if self.base is not None:
            self.step.updater.restart(self.base)
        return metrics

    def _learn(self, rows: range, step: int, refine: bool) -> dict[str, Any]:
        """As many steps as the run has for this batch: one, but for a baseline of equal compute."""
        c, ranks = self.config, self.step.ranks
        mini = c.mini_batch_at(step, refine)
        size = -(-len(rows) // mini) * mini  # a mini-batch without a prompt would be an optimizer step on nothing
        samples = rank_samples(rows.start, size, mini, ranks.dp_rank, ranks.dp).tolist()
        mine = [sample if sample in rows else -1 for sample in samples]
        batch, _ = self.prompts.batch(mine, samples, rows, c.shortest_refine_row, answers=False)
        metrics: dict[str, Any] = {}
        steps = 0.0
        for _ in range(self._passes(step)):
            metrics = self.step(batch.to(self.device), step, refine)
            steps += metrics["train/optimizer_steps"]
        return metrics | ({"train/optimizer_steps": steps} if metrics else {})

    def _passes(self, step: int) -> int:
        done = step - self.config.refine.start_step  # before it all runs are alike
        if self.config.refine.enabled or self.config.train.match != "compute" or done < 0:
            return 1
        ratio = matched_ratio(self.config)  # no whole number: over the batches, it comes out
        return math.floor((done + 1) * ratio) - math.floor(done * ratio)

    def _answer(self, rows: range) -> dict[str, Any]:
        examples = [self.prompts.examples[row] for row in rows]
        prompts = [self.prompts.prompts[row].tolist() for row in rows]
        found: dict[int, str] = {}
        with self.step.clock("answer"):
            for part in self.answerer(questions(examples), prompts):
                found |= part
        self.predictions = predictions(examples, [found[i] for i in range(len(rows))])
        mean = sum(p.score for p in self.predictions) / len(self.predictions)
        return {"task/score": mean} | self.step.clock.take()
