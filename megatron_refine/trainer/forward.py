"""The passes of the model: main stream alone, branches alone from forked states, and both packed into one.

Position convention, everywhere: p is the number of main tokens before a branch. The log-probability of branch token 0
is read from main row p-1, that of token j > 0 from branch row j-1. All k tokens are fed, so that branch row j is the
hidden state after token j.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_refine.models.layout import Branches
from megatron_refine.models.mixer import Handle, State
from megatron_refine.trainer import head
from megatron_refine.trainer.model import unwrap, whole_rows


@dataclass
class MainPass:
    """A finished pass over the main stream."""

    rows: Tensor  # [T, B, hidden]
    scores: head.Scores  # [B, T]: of predicting token t+1 from row t; the target of the last row is meaningless
    handles: dict[int, Handle]

    def states(self, sequences: Tensor, positions: Tensor) -> dict[int, State]:
        """Each layer's state after positions[i] tokens of sequences[i]. Drops the handles, which pin the pass."""
        states = {layer: handle.at(sequences, positions) for layer, handle in self.handles.items()}
        self.handles.clear()
        return states


@dataclass(frozen=True)
class BranchPass:
    rows: Tensor  # [P, n, k, hidden]
    logprobs: Tensor  # [B, c, n, k]


def main_pass(model: nn.Module, tokens: Tensor) -> MainPass:
    """tokens [B, T]; in the graph where gradients are enabled."""
    rows, handles = prefill(model, tokens)
    return MainPass(rows, score_main(model, rows, tokens), handles)


def prefill(model: nn.Module, tokens: Tensor) -> tuple[Tensor, dict[int, Handle]]:
    """tokens [B, T] -> rows [T, B, hidden] and the handles of the layers; no head."""
    layout = Branches(main_len=tokens.shape[1], handles={})
    rows = _rows(model, tokens, layout)
    handles, layout.handles = layout.handles, None  # a recomputation in the backward pass must not collect again
    assert handles is not None
    return rows, handles


def score_pass(model: nn.Module, tokens: Tensor) -> head.Scores:
    """tokens [B, T] -> the scores of `main_pass`, without what its handles pin of every layer."""
    return score_main(model, _rows(model, tokens, Branches(main_len=tokens.shape[1])), tokens)


def ntp_pass(model: nn.Module, tokens: Tensor) -> Any:
    """tokens [B, T] -> {"logprobs": [B, T-1]}; before the last pipeline stage, the hidden rows to send on."""
    output = _forward(model, tokens, Branches(main_len=tokens.shape[1]))
    if not isinstance(output, dict):
        return output
    rows = output["rows"][: tokens.shape[1]]
    return {"logprobs": score_main(model, rows, tokens).logprobs[:, :-1]}


def score_main(model: nn.Module, rows: Tensor, tokens: Tensor) -> head.Scores:
    """rows [T, B, hidden], tokens [B, T] -> scores [B, T] of each next token."""
    targets = F.pad(tokens[:, 1:], (0, 1)).T.flatten()
    flat = head.score(unwrap(model), rows.flatten(0, 1), targets)
    return head.Scores(*(value.unflatten(0, rows.shape[:2]).T for value in vars(flat).values()))


def branch_pass(model: nn.Module, tokens: Tensor, previous: Tensor, states: dict[int, Any]) -> BranchPass:
    """Branches alone.

    Args: tokens [B, c, n, k]; previous [P, hidden], the main rows p-1; states of the P positions by layer.
    """
    batch, chunks, rollouts, length = tokens.shape
    layout = Branches(num_positions=chunks, num_rollouts=rollouts, branch_len=length, states=states)
    _check_graph(states)
    with whole_rows(unwrap(model)):
        rows = layout.split(_rows(model, tokens.flatten(1), layout))[1].unflatten(0, (-1, rollouts))
    return BranchPass(rows, _branch_logprobs(model, rows, previous, tokens))


def packed_pass(
    model: nn.Module, tokens: Tensor, branches: Tensor, sequences: Tensor, positions: Tensor
) -> Tensor | tuple[Tensor, Tensor]:
    """Main and branch rows in one forward.

    Args: tokens [B, T]; branches [B, c, n, k]; sequences, positions [P].
    Returns: log-probabilities [B, T-1] of the main stream and [B, c, n, k] of the branches; before the last pipeline
    stage, the hidden rows that Megatron's schedule sends on.
    """
    batch, chunks, rollouts, length = branches.shape
    layout = Branches(
        main_len=tokens.shape[1], num_positions=chunks, num_rollouts=rollouts, branch_len=length,
        sequences=sequences, positions=positions,
    )  # fmt: skip
    output = _forward(model, torch.cat([tokens, branches.flatten(1)], 1), layout)
    if not isinstance(output, dict):
        return output
    main, forked = layout.split(output["rows"])
    previous = main[sequences, positions - 1]
    branch_rows, branch_targets = _branch_rows(forked.unflatten(0, (-1, rollouts)), previous, branches)
    targets = torch.cat([tokens[:, 1:].flatten(), branch_targets])
    scored = head.score(unwrap(model), torch.cat([main[:, :-1].flatten(0, 1), branch_rows]), targets).logprobs
    main_logprobs, branch_logprobs = scored.split([targets.numel() - branches.numel(), branches.numel()])
    return main_logprobs.view(batch, -1), branch_logprobs.view(branches.shape)


def decode_step(model: nn.Module, tokens: Tensor, states: dict[int, Any]) -> tuple[Tensor, dict[int, Any]]:
    """Feed one token to each of N states, without gradient: tokens [N] -> hidden [N, h], the N states after it."""
    layout = Branches(num_positions=tokens.shape[0], branch_len=1, states=states, final_states={})
    with whole_rows(unwrap(model)):
        rows = _rows(model, tokens[None], layout)
    assert layout.final_states is not None
    return rows[:, 0], layout.final_states


def _branch_logprobs(model: nn.Module, rows: Tensor, previous: Tensor, tokens: Tensor) -> Tensor:
    return head.score(unwrap(model), *_branch_rows(rows, previous, tokens)).logprobs.view(tokens.shape)


def _branch_rows(rows: Tensor, previous: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that predict the branch tokens, and those tokens: rows [P, n, k, h], previous [P, h] -> [Pnk, h], [Pnk]."""
    first = previous[:, None, None].expand(-1, rows.shape[1], 1, -1)
    return torch.cat([first, rows[:, :, :-1]], 2).flatten(0, 2), tokens.flatten()


def _rows(model: nn.Module, tokens: Tensor, layout: Branches) -> Tensor:
    output = _forward(model, tokens, layout)
    assert isinstance(output, dict), "this pass needs all pipeline stages on one rank"
    return output["rows"][: layout.num_rows]


def _forward(model: nn.Module, tokens: Tensor, layout: Branches) -> Any:
    config = unwrap(model).config
    if config.sequence_parallel:
        tokens = F.pad(tokens, (0, -tokens.shape[1] % config.tensor_model_parallel_size))  # rows are scattered
    return model(tokens, None, None, packed_seq_params=layout)


def _check_graph(states: dict[int, Any]) -> None:
    """With gradients on, states must be in the graph: detached ones make gradients silently wrong, by up to 37%."""
    if torch.is_grad_enabled():
        tensors = [tensor for state in states.values() for tensor in state.tensors()]
        assert all(t.requires_grad for t in tensors), "forked states are detached from the main pass"
