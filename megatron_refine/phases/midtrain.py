"""Mid-training: a REFINE or next-token step on each batch of documents."""

from typing import Any

import torch

from megatron_refine.checkpoint.checkpoints import Progress
from megatron_refine.config import Config
from megatron_refine.data.order import rank_samples, sample_rows
from megatron_refine.data.packed import PackedRows
from megatron_refine.estimate.flops import total_steps
from megatron_refine.records import Batch
from megatron_refine.step.refine import RefineStep


class MidTraining:
    """Rows in an order that depends on the seed alone."""

    def __init__(self, config: Config, rows: PackedRows, step: RefineStep, device: torch.device):
        self.config, self.rows, self.step, self.device = config, rows, step, device
        self.total_steps, self.fingerprint = total_steps(config), rows.fingerprint
        self.num_samples: int | None = None  # the stream of samples has no end

    def __call__(self, done: Progress, refine: bool) -> dict[str, Any]:
        """One batch on this rank. Returns its metrics."""
        then = Progress(done.step + 1, done.consumed_samples + self.config.train.global_batch_size)
        following = self._batch(then, refine) if self.config.ahead(then.step, self.total_steps) else None
        return self.step(self._batch(done, refine), done.step, refine, following)

    def _batch(self, done: Progress, refine: bool) -> Batch:
        c, ranks, first = self.config, self.step.ranks, done.consumed_samples
        size, mini = c.train.global_batch_size, c.mini_batch_at(done.step, refine)
        samples = rank_samples(first, size, mini, ranks.dp_rank, ranks.dp)
        order = sample_rows(c.run.seed, first, size, len(self.rows))
        return self.rows.batch(order[samples - first], samples).to(self.device)
