"""A training step: score, select, rollout, rescore, reward, update.

Two-pass and fused differ in one thing: who keeps the graph. `explore` runs the first five stages. With `keep_graph` its
own passes are what the update differentiates (fused); without it, the update makes a packed pass of its own (two-pass).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from megatron_refine.config import Config
from megatron_refine.kernels.places import Places
from megatron_refine.records import (
    Batch,
    Experience,
    Fork,
    LaggingEngine,
    Output,
    RolloutEngine,
    RolloutRequest,
    Rollouts,
    Text,
)
from megatron_refine.step import objective
from megatron_refine.step.advantage import advantages, zero_variance_groups
from megatron_refine.step.hooks import reading, resolve
from megatron_refine.step.metrics import rollout_metrics, rollout_sums
from megatron_refine.step.mismatch import check_gap, logprob_gap, token_weights
from megatron_refine.step.reward import REWARDS, binary, cosine
from megatron_refine.step.select import select_positions, usable
from megatron_refine.trainer import forward
from megatron_refine.trainer.clock import Clock
from megatron_refine.trainer.offload import Offload
from megatron_refine.trainer.optimizer import Updater, UpdateResult
from megatron_refine.trainer.parallel import Ranks, sum_over
from megatron_refine.trainer.random import SELECTION, uniform
from megatron_refine.trainer.rows import Rows


@dataclass(frozen=True)
class Explored:
    """A micro-batch after its rollouts are scored; holds no graph."""

    experience: Experience
    places: Places  # of its positions
    rewards: Tensor  # [B, c, n]
    kinds: Tensor  # [B, c, n, 2], the cosine and the binary reward, whichever is configured
    entropy: Tensor  # [B, T]
    correct: Tensor  # [B, T] bool: the true next token has the highest logit
    truth: Tensor  # [B, c, k]
    gap: Tensor  # [B, c, n, k], |engine's log-probability - ours|, infinite where the engine's is not finite
    version: int  # of the weights that wrote the rollouts


@dataclass(frozen=True)
class Drawn:
    """Rollouts, and where they start."""

    positions: Tensor  # [B, c]
    rollouts: Rollouts

    def rows(self, index: slice) -> "Drawn":
        found = self.rollouts
        part = Rollouts(found.tokens[index], found.logprobs[index], found.weight_version)
        return Drawn(self.positions[index], part)


@dataclass
class Item:
    """A micro-batch of an update."""

    batch: Batch
    step: int
    ntp_count: Tensor  # real targets of the whole mini-batch, over all ranks; on the device, as the next
    nsp_count: Tensor  # rollout tokens of the whole mini-batch, over all ranks
    explored: Explored | None = None  # a fused update's own pass fills it in
    drawn: Drawn | None = None  # None: that pass has them written


class RefineStep:
    """Runs training steps on batches."""

    def __init__(
        self, config: Config, model: nn.Module, engine: RolloutEngine, updater: Updater, ranks: Ranks,
        text: Text | None = None,
    ):  # fmt: skip
        """text: the tokenizer; without one no token is known to end a text, and no reward can read one."""
        self.banned = text.ends if text and config.refine.ban_eos else ()
        self.config, self.model, self.engine, self.updater, self.ranks = config, model, engine, updater, ranks
        self.reward = reading(resolve("refine.reward", config.refine.reward, REWARDS), text.decode if text else None)
        self.clock = Clock()
        self.last: Explored | None = None  # the first micro-batch of the last REFINE step
        self._begun: tuple[Tensor, Any] | None = None  # of the next step: positions, rollouts under way
        self._away: Offload | None = None
        self._offloaded = 0  # bytes, by the last offload

    def __call__(self, batch: Batch, step: int, refine: bool, following: Batch | None = None) -> dict[str, float]:
        """One step on this rank's part of the batch (its part of each mini-batch in turn).

        following: the batch of the next REFINE step, whose rollouts begin before this update where `engine.lag` is 1.
        NTP-only steps make one optimizer step, unless train.match asks for more. Returns the train/, rollout/ and time/
        metrics, means over all ranks.
        Raises MismatchError on all ranks where the engine is too far off; the model has then learned from it.
        """
        size = self.config.train.micro_batch_size
        micros, run = [batch.rows(index) for index in self._micros(batch)], self._main
        drawn, explored = list[Drawn](), list[Explored]()
        if refine:
            drawn = self._meet(batch, step, following)
            run = self._fused if self.config.fused else self._packed
        if refine and not self.config.fused:
            with torch.no_grad(), self._offload(keep_gradients=False):  # once for all: the update starts from zeros
                for i in range(0, len(micros), self.ranks.pp):
                    wave = slice(i, i + self.ranks.pp)
                    found = self.explore_wave(micros[wave], step, keep_graph=False, drawn=drawn[wave])
                    explored += [x for x, _ in found]
        items, results = list[Item](), list[UpdateResult]()
        count = self.config.mini_batch_at(step, refine) // (self.ranks.dp * size)
        for i in range(0, len(micros), count):
            mini = slice(i, i + count)
            items += self._items(micros[mini], step, refine, explored[mini], drawn[mini])
            results.append(self._update(items[i:], run))
        self.updater.advance_schedule()
        metrics = self._loss_metrics(results, refine)
        if refine:
            self.last = items[0].explored
            metrics |= self._rollout_metrics(items)
            if self.config.engine.offload:
                metrics["engine/offloaded_bytes"] = self._offloaded
            gaps = metrics["rollout/logprob_gap_mean"], metrics["rollout/logprob_gap_max"]
            check_gap(*gaps, self.config.engine.stop_gap, step + 1)  # a fused update has its rollouts inside: after it
        return metrics | self.clock.take()

    def selecting(self, selection: str) -> "RefineStep":
        """Return this step with another rule of selection, for evaluations; itself where that is empty."""
        if not selection:
            return self
        other, config = copy(self), self.config
        other.config = config.model_copy(update={"refine": config.refine.model_copy(update={"selection": selection})})
        return other

    def _meet(self, batch: Batch, step: int, following: Batch | None) -> list[Drawn]:
        """Bring the engine to the trainer's weights. With `engine.lag=1`, return the rollouts of each micro-batch, and
        begin those of the following batch."""
        drawn = self._finish(step) if self._begun else None
        with self.clock("sync"):
            self.engine.sync(step)  # before the first rollout: it also follows a resume and NTP-only steps
        if not self.config.engine.lag:
            return []
        if drawn is None:  # in the first step of an attempt, and of REFINE
            self._begin(batch, step)
            drawn = self._finish(step)
        if following:
            self._begin(following, step + 1)
        return [drawn.rows(index) for index in self._micros(batch)]

    @torch.no_grad()
    def _begin(self, batch: Batch, step: int) -> None:
        """Have the rollouts of a step written from the weights of now, while this goes on."""
        found = []
        for micro in map(batch.rows, self._micros(batch)):
            with self.clock("score"):
                entropy = forward.score_pass(self.model, micro.tokens).entropy
            with self.clock("select"):
                found.append(self._select(micro, entropy, step))
        positions = torch.cat(found)
        request = self._request(batch, positions, step, self.config.refine.rollout_temperature)
        self._begun = positions, cast(LaggingEngine, self.engine).begin(request)

    def _finish(self, step: int) -> Drawn:
        assert self._begun
        (positions, begun), self._begun = self._begun, None
        with self.clock("rollout"):
            return Drawn(positions, cast(LaggingEngine, self.engine).finish(begun, step))

    def _micros(self, batch: Batch) -> list[slice]:
        size = self.config.train.micro_batch_size
        return [slice(i, i + size) for i in range(0, len(batch.tokens), size)]

    def explore(
        self, batch: Batch, step: int, keep_graph: bool, temperature: float | None = None, drawn: Drawn | None = None
    ) -> tuple[Explored, Output]:
        """Score, select, rollout, rescore and reward of a micro-batch; `temperature` overrides that of the rollouts.

        drawn: the rollouts, where there are some already.
        """
        return self.explore_wave([batch], step, keep_graph, temperature, [drawn] if drawn else [])[0]

    def explore_wave(
        self, batches: list[Batch], step: int, keep_graph: bool, temperature: float | None = None,
        drawn: Sequence[Drawn] = (),
    ) -> list[tuple[Explored, Output]]:  # fmt: skip
        """`explore` of micro-batches that pass through the pipeline stages one behind the other."""
        temperature = self.config.refine.rollout_temperature if temperature is None else temperature
        wrote = list[tuple[Drawn, forward.Forked]]()
        with torch.set_grad_enabled(keep_graph):
            with self.clock("score"):
                mains = forward.main_passes(self.model, [batch.tokens for batch in batches])
            for i, (batch, main) in enumerate(zip(batches, mains, strict=True)):
                given = drawn[i] if drawn else None
                wrote.append(self._rollout(batch, main, step, temperature, keep_graph, given))
            with self.clock("rescore"):
                branches = forward.branch_passes(self.model, [forked for _, forked in wrote])
        found = zip(batches, mains, wrote, branches, strict=True)
        return [self._judge(batch, main, *pair, branch) for batch, main, pair, branch in found]

    def _select(self, batch: Batch, entropy: Tensor, step: int) -> Tensor:
        """Positions [B, c]."""
        c = self.config.refine
        chunks = torch.arange(c.num_chunks, device=entropy.device)
        u = uniform(self.config.run.seed, SELECTION, step, batch.sample_ids[:, None], chunks)
        return select_positions(
            entropy, batch.lengths, u,
            selection=c.selection, rollout_len=c.rollout_len, margin=c.margin, temperature=c.temperature,
        )  # fmt: skip

    def _request(
        self, batch: Batch, positions: Tensor, step: int, temperature: float, fork: Fork | None = None
    ) -> RolloutRequest:
        c = self.config.refine
        return RolloutRequest(
            batch.tokens, positions, batch.sample_ids, c.num_rollouts, c.rollout_len, temperature,
            self.config.run.seed, step, fork, self.banned,
        )  # fmt: skip

    def _rollout(
        self, batch: Batch, main: forward.MainPass, step: int, temperature: float, keep_graph: bool, drawn: Drawn | None
    ) -> tuple[Drawn, forward.Forked]:
        """Select positions [B, c], fork the states there, and have the engine write from them, unless it has."""
        with self.clock("select"):
            positions = drawn.positions if drawn else self._select(batch, main.scores.entropy, step)
            places = Places.of_each(positions)
            fork = Fork(main.states(places), main.rows.take(places.tokens - 1, places.sequences))
        if drawn is None:
            with torch.no_grad(), self._offload(keep_gradients=keep_graph), self.clock("rollout"):
                request = self._request(batch, positions, step, temperature, fork)
                drawn = Drawn(positions, self.engine.rollout(request))
        return drawn, forward.Forked(drawn.rollouts.tokens, main.rows, places, fork.states, temperature)

    @contextmanager
    def _offload(self, keep_gradients: bool) -> Iterator[None]:
        """Make room for rollouts where engine.offload says so, unless it is made already."""
        if not self.config.engine.offload or self._away:
            yield
            return
        with self.clock("offload"):
            self._away = Offload(self.updater, keep_gradients)
        self._offloaded = self._away.bytes
        try:
            yield
        finally:
            with self.clock("offload"):
                self._away.restore()
            self._away = None

    def _judge(
        self, batch: Batch, main: forward.MainPass, drawn: Drawn, forked: forward.Forked, branch: forward.BranchPass
    ) -> tuple[Explored, Output]:
        """Rewards and advantages, and what the loss is computed from."""
        c, limits = self.config.refine, self.config.engine
        positions, rollouts = drawn.positions, drawn.rollouts
        with self.clock("reward"), torch.no_grad():
            truth, h_true = _continuations(batch.tokens, main.rows, positions, c.rollout_len)
            given = rollouts.tokens, truth, branch.hidden, h_true
            rewards, kinds = self.reward(*given), torch.stack([cosine(*given), binary(*given)], -1)
            old = branch.logprobs.detach()
            experience = Experience(
                positions, rollouts.tokens, old, advantages(rewards, c.advantage_eps, c.advantage_std, c.group),
                token_weights(old, rollouts.logprobs, limits.mask_gap, limits.importance_cap),
                usable(batch.lengths, c.num_chunks, c.margin, c.rollout_len),
            )  # fmt: skip
        gap, scores = logprob_gap(old, rollouts.logprobs), main.scores
        explored = Explored(
            experience, forked.places, rewards, kinds, scores.entropy, scores.correct, truth, gap,
            rollouts.weight_version,
        )  # fmt: skip
        return explored, Output(scores.logprobs[:, :-1], branch.logprobs)

    def _main(self, model: nn.Module, item: Item) -> Output:
        return forward.ntp_pass(model, item.batch.tokens)

    def _fused(self, model: nn.Module, item: Item) -> Output:
        item.explored, output = self.explore(item.batch, item.step, keep_graph=True, drawn=item.drawn)
        return output

    def _packed(self, model: nn.Module, item: Item) -> Output:
        assert item.explored is not None
        e, places = item.explored.experience, item.explored.places
        temperature = self.config.refine.rollout_temperature
        return forward.packed_pass(model, item.batch.tokens, e.tokens, places, temperature)

    def _items(
        self, micros: list[Batch], step: int, refine: bool, explored: list[Explored], drawn: Sequence[Drawn] = ()
    ) -> list[Item]:
        """A mini-batch. Both losses are means over all of it, whatever each rank holds."""
        c = self.config.refine
        lengths = torch.cat([m.lengths for m in micros])
        rollouts = usable(lengths, c.num_chunks, c.margin, c.rollout_len).sum() * self.config.branch_rows * refine
        counts = sum_over(torch.stack([(lengths - 1).clamp(min=0).sum(), rollouts]).double(), self.ranks.dp_group)
        ntp, nsp = counts.clamp(min=1).unbind()
        records: list[Explored | None] = [*explored] or [None] * len(micros)
        written: list[Drawn | None] = [*drawn] or [None] * len(micros)
        return [Item(micro, step, ntp, nsp, x, y) for micro, x, y in zip(micros, records, written, strict=True)]

    def _update(self, items: list[Item], run: Callable[[Any, Item], Output]) -> UpdateResult:
        """One optimizer step on a mini-batch."""
        rows = items[0].batch.tokens.shape[1] + (self.config.branch_rows if items[0].explored else 0)
        with self.clock("update"):
            return self.updater.update(items, run, self._loss, rows, 4)

    def _loss(self, output: Output, item: Item) -> tuple[Tensor, Tensor]:
        """This micro-batch's part of the global loss; of the means of NTP loss, NSP loss, active clips and ratios."""
        c = self.config.refine
        assert output.main is not None
        total = objective.next_token_sums(output.main, item.batch.lengths)[0]
        ntp = total / item.ntp_count.to(total.dtype)
        if item.explored is None or output.branches is None:
            return ntp, torch.stack([ntp, ntp * 0, ntp * 0, ntp * 0])
        e = item.explored.experience
        terms = objective.policy_terms(
            output.branches, e.old_logprobs, e.advantages, c.clip_low, c.clip_high, c.dual_clip
        )  # fmt: skip
        # Means over the rollout tokens of usable sequences. Masked ones count, as zeros of the loss: a fused update
        # fixes their number before it has rollouts. Clips and ratios compare the trainer with itself: no weights there.
        parts = (terms.loss * e.weights, terms.clipped, terms.ratio)
        count = item.nsp_count.to(terms.loss.dtype)
        nsp, clipped, ratio = ((part * e.usable[:, None, None, None]).sum() / count for part in parts)
        if c.loss_mean == "sequence":
            nsp = nsp * c.rollout_len
        return c.ntp_coef * ntp + c.nsp_coef * nsp, torch.stack([ntp, nsp, clipped, ratio])

    def _loss_metrics(self, results: list[UpdateResult], refine: bool) -> dict[str, float]:
        columns = zip(*(r.sums for r in results), strict=True)
        ntp, nsp, clipped, ratio = (math.fsum(column) / len(results) for column in columns)
        c = self.config.refine
        metrics = {
            "train/loss": c.ntp_coef * ntp + c.nsp_coef * nsp if refine else ntp,
            "train/ntp_loss": ntp,
            "train/grad_norm": sum(r.grad_norm for r in results) / len(results),
            "train/lr": self.updater.lr,
            "train/optimizer_steps": sum(not r.skipped for r in results),
        }
        return metrics | (
            {"train/nsp_loss": nsp, "train/clip_fraction": clipped, "train/ratio_mean": ratio} if refine else {}
        )

    def _rollout_metrics(self, items: list[Item]) -> dict[str, float]:
        found = [(item.batch.lengths, item.explored) for item in items if item.explored]
        group = self.config.refine.group
        sums = [
            rollout_sums(
                x.experience, x.rewards, x.kinds, x.entropy, lengths, zero_variance_groups(x.rewards, group), x.gap
            )
            for lengths, x in found
        ]
        gaps = (x.gap.masked_fill(~x.experience.usable[:, None, None, None], 0) for _, x in found)
        largest = torch.stack([gap.max() for gap in gaps]).max()
        return rollout_metrics(sums, largest, min(x.version for _, x in found), self.ranks.dp_group)


def _continuations(tokens: Tensor, rows: Rows, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Tokens p..p+k-1 and the hidden states after them: tokens [B, T] -> [B, c, k], [B, c, k, h]."""
    after = positions[..., None] + torch.arange(length, device=positions.device)
    sequence = torch.arange(len(positions), device=positions.device)[:, None, None]
    return tokens[sequence, after], rows.take(after, sequence)
