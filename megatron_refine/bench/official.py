"""The official scheme as a baseline: every selected prefix is a row of full length (princetonvisualai/ReFINE, 73b5b66).

    entropy       a forward of each sequence
    rollouts      DeltaNet: a prefill of each row, then k-1 decoded tokens; LaCT: a forward of each row for each token
    old log-prob  a forward of each row
    update        forward and backward of each row for the policy, of each sequence for next tokens

Written from the description of it in docs/official-names.md, on this project's model: same draws, same rewards, same
loss, and so the same gradient as the fused update. Rows are padded on the right here, which costs what padding on the
left costs; as in flash-linear-attention, the mixers of the delta rule see no pads, all else does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_refine.kernels.places import Places
from megatron_refine.models.layout import Branches
from megatron_refine.models.mixer import Mixer
from megatron_refine.records import Batch, Experience, Output, Rollouts
from megatron_refine.step import objective
from megatron_refine.step.advantage import advantages
from megatron_refine.step.refine import Item, RefineStep
from megatron_refine.step.select import usable
from megatron_refine.trainer import forward, head
from megatron_refine.trainer.model import unwrap
from megatron_refine.trainer.random import ROLLOUT, uniform

ROWS = 2  # in a pass, as in the official demos


@dataclass(frozen=True)
class Prefixes:
    """Rows of the policy loss: prefix and rollout, then pads."""

    tokens: Tensor  # [R, T]
    lengths: Tensor  # [R], of the prefixes
    old: Tensor  # [R, k]
    advantages: Tensor  # [R]
    count: float  # rollout tokens of the whole batch


class OfficialStep(RefineStep):
    """A REFINE step on one rank, one optimizer step a batch."""

    def __call__(
        self, batch: Batch, step: int, refine: bool = True, following: Batch | None = None
    ) -> dict[str, float]:
        micros = [batch.rows(index) for index in self._micros(batch)]
        records = [self._explore(micro, step) for micro in micros]
        real = torch.cat([usable(m.lengths, *self._limits()) for m in micros]).sum()
        count = float(real * self.config.branch_rows)
        targets = (batch.lengths - 1).sum()
        items: list[Any] = [Item(micro, step, targets, targets * 0) for micro in micros]
        for micro, record in zip(micros, records, strict=True):
            items += self._policy_items(micro, record, count)
        with self.clock("update"):
            self.updater.update(items, self._pass, self._part, batch.tokens.shape[1], 2)
        self.updater.advance_schedule()
        return self.clock.take()

    def _limits(self) -> tuple[int, int, int]:
        c = self.config.refine
        return c.num_chunks, c.margin, c.rollout_len

    @torch.no_grad()
    def _explore(self, batch: Batch, step: int) -> Experience:
        c = self.config.refine
        with self.clock("score"):
            main = forward.main_pass(self.model, batch.tokens)
            main.handles.clear()
        positions = self._select(batch, main.scores.entropy, step)
        rows = positions.flatten().repeat_interleave(c.num_rollouts)
        sequences = torch.arange(len(positions), device=rows.device).repeat_interleave(len(rows) // len(positions))
        with self.clock("rollout"):
            tokens, _ = self._rollouts(batch, step, positions, sequences, rows)
        with self.clock("rescore"):
            whole = _rows(batch.tokens[sequences], rows, tokens)
            old, states = zip(*(self._rescore(whole[i : i + ROWS], rows[i : i + ROWS])
                                for i in range(0, len(rows), ROWS)), strict=True)  # fmt: skip
        shape = (*positions.shape, c.num_rollouts, c.rollout_len)
        after = positions[..., None] + torch.arange(c.rollout_len, device=rows.device)
        place = torch.arange(len(positions), device=rows.device)[:, None, None]
        truth, h_true = batch.tokens[place, after], main.rows.take(after, place)
        tokens = tokens.view(shape)
        rewards = self.reward(tokens, truth, torch.cat(states).view(*shape, -1), h_true)
        kept = torch.cat(old).view(shape)
        return Experience(
            positions, tokens, kept, advantages(rewards, c.advantage_eps, group=c.group), torch.ones_like(kept),
            usable(batch.lengths, *self._limits()),
        )  # fmt: skip

    def _rollouts(
        self, batch: Batch, step: int, positions: Tensor, sequences: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens and log-probabilities [R, k] of the rows, by the draws of the native engine."""
        c, device = self.config.refine, lengths.device
        numbers = torch.arange(positions.shape[1] * c.num_rollouts, device=device).view(-1, c.num_rollouts)
        places = torch.arange(c.rollout_len, device=device).view(-1, 1, 1, 1)
        samples, starts = batch.sample_ids[:, None, None], positions[..., None]
        draws = uniform(self.config.run.seed, ROLLOUT, step, samples, starts, numbers, places).flatten(1)  # [k, R]
        parts = [
            write(self.model, batch.tokens[sequences[i : i + ROWS]], lengths[i : i + ROWS], draws[:, i : i + ROWS],
                  c.rollout_temperature, self.banned)
            for i in range(0, len(lengths), ROWS)
        ]  # fmt: skip
        return torch.cat([p.tokens for p in parts]), torch.cat([p.logprobs for p in parts])

    def _rescore(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """[R, T] -> log-probabilities [R, k] of what follows each prefix, and the hidden states after it [R, k, h]."""
        c = self.config.refine
        with unpadded(self.model, lengths + c.rollout_len):
            rows, handles = forward.prefill(self.model, tokens)
        handles.clear()
        at = torch.full(tokens.shape, head.scored_at(c.rollout_temperature), device=tokens.device, dtype=torch.float64)
        scores = forward.score_main(rows, tokens, at)
        after = lengths[:, None] + torch.arange(c.rollout_len, device=lengths.device)
        row = torch.arange(len(tokens), device=lengths.device)[:, None]
        return scores.logprobs[row, after - 1], rows.take(after, row)

    def _policy_items(self, batch: Batch, record: Experience, count: float) -> Iterator[Prefixes]:
        n = self.config.refine.num_rollouts
        rows = record.positions.flatten().repeat_interleave(n)
        sequences = torch.arange(len(record.positions), device=rows.device).repeat_interleave(
            len(rows) // len(record.positions)
        )
        fields = (
            _rows(batch.tokens[sequences], rows, record.tokens.flatten(0, 2)), rows,
            record.old_logprobs.flatten(0, 2), (record.advantages * record.usable[:, None, None]).flatten(),
        )  # fmt: skip
        for i in range(0, len(rows), ROWS):
            tokens, lengths, old, own = (field[i : i + ROWS] for field in fields)
            yield Prefixes(tokens, lengths, old, own, count)

    def _pass(self, model: nn.Module, item: Any) -> Output:
        if isinstance(item, Item):
            return forward.ntp_pass(model, item.batch.tokens)
        return Output(self._rescore(item.tokens, item.lengths)[0])

    def _part(self, output: Output, item: Any) -> tuple[Tensor, Tensor]:
        c, logprobs = self.config.refine, output.main
        assert logprobs is not None
        if isinstance(item, Item):
            total = objective.next_token_sums(logprobs, item.batch.lengths)[0]
            ntp = total / item.ntp_count.to(total.dtype)
            return c.ntp_coef * ntp, torch.stack([ntp, ntp * 0])
        terms = objective.policy_terms(logprobs, item.old, item.advantages, c.clip_low, c.clip_high, c.dual_clip)
        nsp = terms.loss.sum() / item.count
        return c.nsp_coef * nsp, torch.stack([nsp * 0, nsp])


def _rows(tokens: Tensor, lengths: Tensor, rollouts: Tensor) -> Tensor:
    """Prefix, rollout, pads: [R, T], [R], [R, k] -> [R, T]."""
    place = torch.arange(tokens.shape[1], device=tokens.device) - lengths[:, None]
    written = rollouts.gather(1, place.clamp(0, rollouts.shape[1] - 1))
    return torch.where(place < 0, tokens, torch.where(place < rollouts.shape[1], written, 0))


@torch.no_grad()
def write(
    model: nn.Module, tokens: Tensor, lengths: Tensor, draws: Tensor, temperature: float, banned: tuple[int, ...] = ()
) -> Rollouts:
    """Continue each prefix of `lengths` [R] tokens of `tokens` [R, T] in rows of full length: draws [k, R].

    The delta rule is prefilled and decoded from its state; LaCT, which has no cache there, runs anew for every token.
    """
    row = torch.arange(len(tokens), device=tokens.device)
    written, logprobs = list[Tensor](), list[Tensor]()
    hidden, states, cached = tokens.new_zeros(0), dict[int, Any](), _recurrent(model)
    for j, u in enumerate(draws):
        if j and cached:
            rows, states = forward.decode_step(model, written[-1], states)
            hidden = rows.take(row, row * 0)
        else:
            text = _rows(tokens, lengths, torch.stack(written, 1) if j else tokens[:, :1] * 0)
            with unpadded(model, lengths + j):
                rows, handles = forward.prefill(model, text)
            hidden = rows.take(lengths + j - 1, row)
            if cached:
                places = Places.read(row, lengths)
                states = {layer: handle.at(places) for layer, handle in handles.items()}
        token, logprob = head.sample(unwrap(model), hidden, u, temperature, banned=banned)
        written.append(token)
        logprobs.append(logprob)
    return Rollouts(torch.stack(written, 1), torch.stack(logprobs, 1), 0)


def _recurrent(model: nn.Module) -> bool:
    from megatron_refine.models.mixers.delta.mixer import DeltaMixer

    return any(isinstance(module, DeltaMixer) for module in model.modules())


@contextmanager
def unpadded(model: nn.Module, lengths: Tensor) -> Iterator[None]:
    """Within, the mixers of the delta rule see the first lengths[b] rows of each sequence alone."""
    from megatron_refine.models.mixers.delta.mixer import DeltaMixer

    mixers = [module for module in model.modules() if isinstance(module, DeltaMixer)]
    for mixer in mixers:
        mixer.forward = _Unpadded(mixer, lengths.tolist())  # type: ignore[method-assign]
    try:
        yield
    finally:
        for mixer in mixers:
            del mixer.forward


class _Unpadded:
    def __init__(self, mixer: Mixer, lengths: list[int]):
        self.mixer, self.lengths, self.forward = mixer, lengths, type(mixer).forward

    def __call__(
        self, hidden_states: Tensor, *_: Any, packed_seq_params: Any = None, **__: Any
    ) -> tuple[Tensor, Tensor | None]:
        parts, handles = list[Tensor](), list[Any]()
        for b, length in enumerate(self.lengths):
            layout = Branches(main_len=length, handles={})
            mixed, _bias = self.forward(self.mixer, hidden_states[:length, b : b + 1], packed_seq_params=layout)
            parts.append(F.pad(mixed, (0, 0, 0, 0, 0, len(hidden_states) - length)))
            handles += (layout.handles or {}).values()
        if packed_seq_params.handles is not None:
            packed_seq_params.handles[self.mixer.layer_number] = _Handles(handles)
        return torch.cat(parts, 1), None


@dataclass(frozen=True)
class _Handles:
    """One of each sequence."""

    handles: list[Any]

    def at(self, places: Places) -> Any:
        first = torch.zeros(1, dtype=torch.int64, device=places.tokens.device)
        each = zip(places.on_host, places.tokens, strict=True)
        found = [self.handles[b].at(Places(first, p[None], [(0, tokens)])) for (b, tokens), p in each]
        return type(found[0])(*(torch.cat(parts) for parts in zip(*(state.tensors() for state in found), strict=True)))
