"""The passes of the model: main stream alone, branches alone from forked states, and both packed into one.

Position convention, everywhere: p is the number of main tokens before a branch. The log-probability of branch token 0
is read from main row p-1, that of token j > 0 from branch row j-1. All k tokens are fed, so that branch row j is the
hidden state after token j.

Branch tokens are scored at the temperature that they were drawn at, main tokens at 1: row p-1 has targets of both.

Context parallel ranks hold a part of a pass's rows each (trainer/rows.py). Passes without gradient cross pipeline
stages by themselves (trainer/pipeline.py); `ntp_pass` and `packed_pass` run in Megatron's schedules.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_refine.kernels.places import Places
from megatron_refine.models.layout import Branches
from megatron_refine.models.mixer import Handle, State
from megatron_refine.records import Output
from megatron_refine.trainer import head
from megatron_refine.trainer.layers import whole_rows
from megatron_refine.trainer.model import unwrap
from megatron_refine.trainer.parallel import from_last_stage
from megatron_refine.trainer.pipeline import Link
from megatron_refine.trainer.rows import Held, Rows, score


@dataclass
class MainPass:
    """A finished pass over the main stream."""

    rows: Rows  # T of them
    scores: head.Scores  # [B, T]: of predicting token t+1 from row t; the target of the last row is meaningless
    handles: dict[int, Handle]  # of this stage's layers

    def states(self, places: Places) -> dict[int, State]:
        """Each layer's state at P places. Drops the handles, which pin the pass."""
        states = {layer: handle.at(places) for layer, handle in self.handles.items()}
        self.handles.clear()
        return states


@dataclass(frozen=True)
class Forked:
    """What a pass over branches alone needs."""

    tokens: Tensor  # [B, c, n, k]
    main: Rows  # of the pass that the states are of
    places: Places  # P of them
    states: dict[int, Any]  # there, by layer
    temperature: float = 1.0  # that the tokens were drawn at; 0: greedily


@dataclass(frozen=True)
class BranchPass:
    hidden: Tensor  # [B, c, n, k, hidden], no gradient
    logprobs: Tensor  # [B, c, n, k], `head.scored_at` the temperature


def main_pass(model: nn.Module, tokens: Tensor) -> MainPass:
    """tokens [B, T]; in the graph where gradients are enabled."""
    return main_passes(model, [tokens])[0]


def main_passes(model: nn.Module, micros: Sequence[Tensor]) -> list[MainPass]:
    """Several at once: while one is on a pipeline stage, the next is on the stage before it."""
    link = Link(unwrap(model))
    begun = [prefill(model, tokens, link) for tokens in micros]
    link.wait()
    return [
        MainPass(rows, _on_all_stages(rows, partial(score_main, rows, tokens), tokens.shape), handles)
        for tokens, (rows, handles) in zip(micros, begun, strict=True)
    ]


def prefill(model: nn.Module, tokens: Tensor, link: Link | None = None) -> tuple[Rows, dict[int, Handle]]:
    """tokens [B, T] -> rows and the handles of the layers; no head. link: as of `decode_step`."""
    layout = Branches(main_len=tokens.shape[1], handles={})
    rows = _rows(model, tokens, layout, link)
    handles, layout.handles = layout.handles, None  # a recomputation in the backward pass must not collect again
    assert handles is not None
    return rows, handles


def score_pass(model: nn.Module, tokens: Tensor, temperature: Tensor | None = None) -> head.Scores:
    """tokens [B, T] -> the scores of `main_pass`, without what its handles pin of every layer.

    temperature: [B, T] of the rows' distributions; None: 1.
    """
    rows = _rows(model, tokens, Branches(main_len=tokens.shape[1]))
    return _on_all_stages(rows, partial(score_main, rows, tokens, temperature), tokens.shape)


def ntp_pass(model: nn.Module, tokens: Tensor) -> Output:
    """The main stream alone, of tokens [B, T]."""
    rows, hidden = staged(model, tokens, Branches(main_len=tokens.shape[1]))
    return Output(hidden=hidden) if rows is None else Output(score_main(rows, tokens).logprobs[:, :-1])


def score_main(rows: Rows, tokens: Tensor, temperature: Tensor | None = None) -> head.Scores:
    """Scores [B, T] of each next token of tokens [B, T], on the last stage; temperature as for `score_pass`."""
    shape, targets = tokens.T.shape, F.pad(tokens[:, 1:], (0, 1)).T.flatten()
    at = None if temperature is None else temperature.T.flatten()
    flat = score(rows.model, [rows.span(shape[0])], targets, at)
    return head.Scores(*(value.unflatten(0, shape).T for value in vars(flat).values()))


def branch_pass(model: nn.Module, forked: Forked) -> BranchPass:
    """Branches alone; in the graph where gradients are enabled."""
    return branch_passes(model, [forked])[0]


def branch_passes(model: nn.Module, micros: Sequence[Forked]) -> list[BranchPass]:
    """Several at once, as `main_passes`."""
    link, found = Link(unwrap(model)), []
    for forked in micros:
        _, chunks, rollouts, length = forked.tokens.shape
        layout = Branches(num_positions=chunks, num_rollouts=rollouts, branch_len=length, states=forked.states)
        _check_graph(forked.states)
        with whole_rows(unwrap(model)):
            found.append(_rows(model, forked.tokens.flatten(1), layout, link))
    link.wait()
    return [_score_branches(forked, rows) for forked, rows in zip(micros, found, strict=True)]


def _score_branches(forked: Forked, rows: Rows) -> BranchPass:
    tokens = forked.tokens

    def scores() -> head.Scores:
        pieces = _branch_pieces(forked.main, rows, 0, tokens, forked.places)
        return score(rows.model, pieces, _branch_targets(tokens), _temperatures(0, tokens, forked.temperature))

    logprobs = _on_all_stages(rows, scores, torch.Size([tokens.numel()])).logprobs
    sequence = torch.arange(len(tokens), device=tokens.device)[:, None]
    hidden = rows.take(torch.arange(tokens[0].numel(), device=tokens.device), sequence)
    return BranchPass(hidden.view(*tokens.shape, -1), _by_branch(logprobs, tokens.shape))


def packed_pass(model: nn.Module, tokens: Tensor, branches: Tensor, places: Places, temperature: float = 1.0) -> Output:
    """Main and branch rows in one forward.

    Args: tokens [B, T]; branches [B, c, n, k], drawn at `temperature`, from P places.
    """
    _, chunks, rollouts, length = branches.shape
    batch, main_len = tokens.shape
    layout = Branches(
        main_len=main_len, num_positions=chunks, num_rollouts=rollouts, branch_len=length, places=places
    )  # fmt: skip
    rows, hidden = staged(model, torch.cat([tokens, branches.flatten(1)], 1), layout)
    if rows is None:
        return Output(hidden=hidden)
    pieces = [rows.span(main_len - 1), *_branch_pieces(rows, rows, main_len, branches, places)]
    targets = torch.cat([tokens[:, 1:].T.flatten(), _branch_targets(branches)])
    count = targets.numel() - branches.numel()
    scored = score(rows.model, pieces, targets, _temperatures(count, branches, temperature)).logprobs
    main, forked = scored.split([count, branches.numel()])
    return Output(main.view(-1, batch).T, _by_branch(forked, branches.shape))


def decode_step(
    model: nn.Module, tokens: Tensor, states: dict[int, Any], link: Link | None = None
) -> tuple[Rows, dict[int, Any]]:
    """Feed one token to each of N states, without gradient: tokens [N] -> N rows, the N states after them.

    link: across pipeline stages, from the stage before and to the next; `link.wait()` sometime after.
    """
    layout = Branches(num_positions=tokens.shape[0], branch_len=1, states=states, final_states={})
    with whole_rows(unwrap(model)):
        rows = _rows(model, tokens[None], layout, link)
    assert layout.final_states is not None
    return rows, layout.final_states


def _branch_pieces(main: Rows, rows: Rows, first: int, tokens: Tensor, places: Places) -> list[Held]:
    """Rows that predict branch tokens [B, c, n, k]: all first tokens, then all others; branch rows begin at `first`."""
    batch, chunks, rollouts, length = tokens.shape
    starts = main.pick((places.tokens - 1).repeat_interleave(rollouts), places.sequences.repeat_interleave(rollouts))
    if length == 1:
        return [starts]
    branch = torch.arange(chunks * rollouts, device=tokens.device)[:, None] * length
    index = first + (branch + torch.arange(length - 1, device=tokens.device)).flatten()
    sequence = torch.arange(batch, device=tokens.device).repeat_interleave(len(index))
    return [starts, rows.pick(index.repeat(batch), sequence)]


def _branch_targets(tokens: Tensor) -> Tensor:
    """Branch tokens [B, c, n, k] in the order of `_branch_pieces`."""
    return torch.cat([tokens[..., 0].flatten(), tokens[..., 1:].flatten()])


def _temperatures(main: int, branches: Tensor, temperature: float) -> Tensor | None:
    """Of `main` targets of the main stream, then of those of the branches; None: 1 for all."""
    value = head.scored_at(temperature)
    if value == 1:
        return None
    ones = torch.ones(main, dtype=torch.float64, device=branches.device)
    return torch.cat([ones, ones.new_full((branches.numel(),), value)])


def _by_branch(values: Tensor, shape: torch.Size) -> Tensor:
    """The inverse: [Bcnk] -> [B, c, n, k]."""
    first, others = values.split([values.numel() // shape[-1], values.numel() - values.numel() // shape[-1]])
    return torch.cat([first.view(*shape[:-1], 1), others.view(*shape[:-1], -1)], -1)


def _on_all_stages(rows: Rows, scores: Callable[[], head.Scores], shape: torch.Size) -> head.Scores:
    """The scores, of a known shape, that the last pipeline stage computes from the rows."""
    group, config = rows.model.pg_collection.pp, rows.model.config
    if group.size() == 1:
        return scores()
    if rows.local is not None:
        found = scores()
    else:
        high = torch.promote_types(config.params_dtype, torch.float32)
        values = torch.empty(shape, dtype=high, device=next(rows.model.parameters()).device)
        found = head.Scores(values, values.clone(), values.bool())
    return head.Scores(*(from_last_stage(value, group) for value in vars(found).values()))


def _rows(model: nn.Module, tokens: Tensor, layout: Branches, link: Link | None = None) -> Rows:
    """A pass through all pipeline stages; with gradient only where there is one."""
    inner = unwrap(model)
    if inner.pg_collection.pp.size() == 1:
        return Rows(inner, _forward(model, tokens, layout))
    assert not torch.is_grad_enabled(), "a pass across pipeline stages keeps no graph"
    own = link or Link(inner)
    length = -(-tokens.shape[1] // row_unit(inner.config))  # between two layers, on each rank
    output = own.through(lambda: _forward(model, tokens, layout), length, len(tokens))
    if not link:
        own.wait()
    return Rows(inner, output)


def staged(model: nn.Module, tokens: Tensor, layout: Branches) -> tuple[Rows | None, Tensor | None]:
    """A pass within Megatron's schedules: (rows, None) on the last pipeline stage, (None, hidden rows) before it."""
    inner, found = unwrap(model), _forward(model, tokens, layout)
    return (Rows(inner, found), None) if inner.post_process else (None, found)


def row_unit(config: Any) -> int:
    """Ranks that the rows of a pass are cut over: their number is a multiple of it."""
    return config.context_parallel_size * (config.tensor_model_parallel_size if config.sequence_parallel else 1)


def _forward(model: nn.Module, tokens: Tensor, layout: Branches) -> Tensor:
    inner = unwrap(model)
    tokens = F.pad(tokens, (0, -tokens.shape[1] % row_unit(inner.config)))
    cp = inner.pg_collection.cp
    # not through Megatron's wrappers, which cast what the last stage returns to fp32
    found: Tensor = inner(tokens.chunk(cp.size(), 1)[cp.rank()], None, None, packed_seq_params=layout)
    return found


def _check_graph(states: dict[int, Any]) -> None:
    """With gradients on, states must be in the graph: detached ones make gradients silently wrong, by up to 37%."""
    if torch.is_grad_enabled():
        tensors = [tensor for state in states.values() for tensor in state.tensors()]
        assert all(t.requires_grad for t in tensors), "forked states are detached from the main pass"
