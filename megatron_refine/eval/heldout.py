"""Held-out sequences: next-token loss, accuracy and entropy, and the reward and greedy match of rollouts."""

import torch
from torch import Tensor

from megatron_refine.data.packed import PackedRows
from megatron_refine.records import Batch
from megatron_refine.step.refine import Explored, RefineStep
from megatron_refine.trainer import forward
from megatron_refine.trainer.parallel import sum_over

COUNTER = 1 << 40  # the step counter of evaluations: the same draws every time, and none of a training step's


class HeldOut:
    """The first `eval.sequences` held-out rows, always the same, spread over the data-parallel ranks."""

    def __init__(self, step: RefineStep, rows: PackedRows, device: torch.device):
        self.step, self.rows, self.device = step.selecting(step.config.eval.selection), rows, device
        self.explores = step.config.refine.enabled and step.config.eval.rollouts
        self.sample: tuple[Batch, Explored] | None = None  # this rank's first sequences, for the report

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """The eval/ metrics: means over all tokens, and over all rollouts, of the held-out sequences."""
        config, ranks = self.step.config, self.step.ranks
        everyone = range(min(config.eval.sequences, len(self.rows)))
        mine = everyone[ranks.dp_rank :: ranks.dp]
        total = torch.zeros(8, dtype=torch.float64, device=self.device)
        for i in range(0, -(-len(everyone) // ranks.dp), config.train.micro_batch_size):
            # a replica without a sequence of its own takes part all the same: engines want all ranks in step
            index = mine[i : i + config.train.micro_batch_size] or everyone[:1]
            batch = self.rows.batch(index, index).to(self.device)
            sums = self._rollouts(batch) if self.explores else self._tokens(batch)
            total += sums * (i < len(mine))
        self.step.clock.take()  # no part of a training step's seconds
        loss, correct, sampled, entropy, tokens, *rest = sum_over(total, ranks.dp_group).tolist()
        reward, matches, rollouts = rest
        metrics = {
            "eval/ntp_loss": loss / max(tokens, 1),
            "eval/ntp_accuracy": correct / max(tokens, 1),
            "eval/sampled_accuracy": sampled / max(tokens, 1),  # expected, of a token drawn at each place
            "eval/entropy": entropy / max(tokens, 1),
        }
        return metrics | (
            {"eval/reward_mean": reward / rollouts, "eval/greedy_match": matches / rollouts} if rollouts else {}
        )

    def _tokens(self, batch: Batch) -> Tensor:
        scores = forward.score_pass(self.step.model, batch.tokens)
        return _sums(batch, scores.logprobs[:, :-1], scores.correct, scores.entropy)

    def _rollouts(self, batch: Batch) -> Tensor:
        explored, output = self.step.explore(batch, COUNTER, keep_graph=False)
        greedy, _ = self.step.explore(batch, COUNTER, keep_graph=False, temperature=0.0)
        self.sample = self.sample or (batch, explored)
        use = explored.experience.usable
        match = (greedy.experience.tokens == greedy.truth[:, :, None]).double().mean(-1)[use]
        assert output.main is not None
        total = _sums(batch, output.main, explored.correct, explored.entropy)
        total[5:] = torch.stack([explored.rewards[use].double().sum(), match.sum(), match.new_tensor(match.numel())])
        return total


def _sums(batch: Batch, logprobs: Tensor, correct: Tensor, entropy: Tensor) -> Tensor:
    """[loss, correct, probability, entropy, tokens, 0, 0, 0] over real targets; logprobs [B, T-1]; correct and entropy
    [B, T]."""
    real = torch.arange(1, logprobs.shape[1] + 1, device=logprobs.device) < batch.lengths[:, None]
    sums = [-logprobs, correct[:, :-1], logprobs.exp(), entropy[:, :-1], real]
    return torch.stack(
        [(x * real).sum().double() for x in sums] + [torch.zeros((), dtype=torch.float64, device=real.device)] * 3
    )
