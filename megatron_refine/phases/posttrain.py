"""Post-training: on each batch a step on the prompts, then one optimizer step on their answers (arXiv 2602.16704, 3.3).

Both change the same weights for good; no gradient flows from the second through the first. The step on the prompts is
REFINE, or next-token prediction (nested SFT), or left out (plain SFT).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_refine.checkpoint.checkpoints import Progress
from megatron_refine.config import Config
from megatron_refine.data.order import rank_samples, sample_rows
from megatron_refine.data.prompts import Prompts
from megatron_refine.estimate.flops import total_steps
from megatron_refine.records import Batch, Output
from megatron_refine.step.refine import RefineStep
from megatron_refine.trainer import forward
from megatron_refine.trainer.parallel import sum_over


@dataclass(frozen=True)
class AnswerItem:
    """A micro-batch of the step on the answers."""

    batch: Batch  # tokens with answers; lengths of the prompts
    lengths: Tensor  # [B], with answers
    count: float  # what the sum over its answers' tokens is divided by


class PostTraining:
    """Prompts in an order that depends on the seed alone."""

    def __init__(self, config: Config, prompts: Prompts, step: RefineStep, device: torch.device):
        self.config, self.prompts, self.step, self.device = config, prompts, step, device
        self.total_steps, self.fingerprint = total_steps(config), prompts.fingerprint
        self.num_samples: int | None = None

    def __call__(self, done: Progress, refine: bool) -> dict[str, Any]:
        """One batch on this rank. Returns its metrics."""
        c, then = self.config, Progress(done.step + 1, done.consumed_samples + self.config.train.global_batch_size)
        batch, lengths = self._batch(done, refine)
        following = self._batch(then, refine)[0] if c.ahead(then.step, self.total_steps) else None
        metrics: dict[str, Any] = self.step(batch, done.step, refine, following) if c.task.inner_step else {}
        metrics |= self._learn_answers(batch, lengths)
        if not c.task.inner_step:
            self.step.updater.advance_schedule()
            metrics |= {"train/loss": metrics["train/answer_loss"], "train/lr": self.step.updater.lr}
        metrics["train/optimizer_steps"] = metrics.get("train/optimizer_steps", 0) + 1
        return metrics

    def _batch(self, done: Progress, refine: bool) -> tuple[Batch, Tensor]:
        """This rank's prompts with their answers, and how long they are together."""
        c, ranks, first = self.config, self.step.ranks, done.consumed_samples
        size, mini = c.train.global_batch_size, c.mini_batch_at(done.step, refine)
        samples = rank_samples(first, size, mini, ranks.dp_rank, ranks.dp)
        order = sample_rows(c.run.seed, first, size, len(self.prompts))
        batch, lengths = self.prompts.batch(
            order[samples - first].tolist(), samples.tolist(), order.tolist(), c.shortest_refine_row, answers=True
        )
        return batch.to(self.device), lengths.to(self.device)

    def _learn_answers(self, batch: Batch, lengths: Tensor) -> dict[str, float]:
        """One optimizer step on the mean cross-entropy of the answers' tokens, of all ranks' sequences."""
        step, size = self.step, self.config.train.micro_batch_size
        tokens = lengths - batch.lengths
        parts = [slice(i, i + size) for i in range(0, len(lengths), size)]
        if self.config.task.answer_mean == "micro_batch":
            number = len(parts) * step.ranks.dp
            counts = [max(float(tokens[part].sum()), 1.0) * number for part in parts]
        else:
            counts = [float(sum_over(tokens.sum().double(), step.ranks.dp_group))] * len(parts)
        items = [AnswerItem(batch.rows(part), lengths[part], n) for part, n in zip(parts, counts, strict=True)]
        with step.clock("answer"):
            result = step.updater.update(items, _forward, _answer_loss, batch.tokens.shape[1], 1)
        return {"train/answer_loss": result.sums[0]} | step.clock.take()


def _forward(model: nn.Module, item: AnswerItem) -> Output:
    return forward.ntp_pass(model, item.batch.tokens)


def _answer_loss(output: Output, item: AnswerItem) -> tuple[Tensor, Tensor]:
    assert output.main is not None
    loss = answer_sum(output.main, item.batch.lengths, item.lengths) / item.count
    return loss, loss[None]


def answer_sum(logprobs: Tensor, prompt_lengths: Tensor, lengths: Tensor) -> Tensor:
    """Sum of -log-probability over the answers' tokens.

    logprobs [B, T-1], of tokens 1..T-1; prompt_lengths [B]; lengths [B], with answers -> scalar.
    """
    token = torch.arange(1, logprobs.shape[1] + 1, device=logprobs.device)
    answer = (token >= prompt_lengths[:, None]) & (token < lengths[:, None])
    return -(logprobs * answer).sum()
