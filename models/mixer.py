"""What every sequence mixer offers: a main stream, the state at any of its positions, and branches from there.

    main(x)            -> (y, handle)   handle keeps what the pass has anyway
    handle.at(p)       -> State         the state after p main tokens, lazy, in the graph if x was
    branch(x_b, State) -> (y_b, State)  k rows a branch, from that state

Everything else in the model is row-wise and does not know of branches. See docs/branch-packing.md.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from megatron_refine.kernels.places import Places
from megatron_refine.models.common.context import to_heads, to_rows
from megatron_refine.models.layout import Branches

Initialize = Callable[[Tensor, torch.Generator], Tensor]


class State(Protocol):
    """All that a mixer knows of the tokens so far, of P sequences."""

    def tensors(self) -> list[Tensor]:
        """What must be in the graph of the main pass when gradients are on."""
        ...

    def detach(self) -> "State": ...

    def part(self, positions: slice) -> "State":
        """Those of some of the P positions, before any branch token."""
        ...

    def fork(self, n: int) -> "State":
        """n consecutive copies of each of the P states."""
        ...

    def fixed(self, tokens: int) -> "State | None":
        """For a recording: the same state, from which `tokens` tokens are fed, one by one, by operations that are the
        same wherever it stands in a sequence; what differs is in its tensors. None where there are no such."""
        ...


class Handle(Protocol):
    """A finished main pass, from which states are taken."""

    def at(self, places: Places) -> State:
        """The state at P places. Reads no value from the device: every layer would wait for it."""
        ...


class Mixer(MegatronModule):
    """Splits the rows of a pass by its layout; a family fills in the maths.

    Rows are in natural order and complete where they are mixed, with this rank's heads: `project` gathers them under
    sequence parallelism, an all-to-all under context parallelism, and both are undone after. So main, at and branch
    need no collective.
    """

    layer_number: int
    tp_group: Any
    cp_group: Any

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of the mixer itself, not of the layers in it, that are `sharded`."""
        raise NotImplementedError

    def project(self, hidden: Tensor) -> Tensor:
        """[S/cp (/tp), B, hidden] -> projected rows [S/cp, B, heads/tp, *]."""
        raise NotImplementedError

    def mixed_columns(self, rows: Tensor) -> Tensor:
        """Of projected rows [.., *], what `main` and `branch` need: the rest need not travel to another rank."""
        return rows

    def main(self, rows: Tensor) -> tuple[Tensor, Handle]:
        """[B, T, heads/(tp cp), *] -> outputs [B, T, heads/(tp cp), *], handle."""
        raise NotImplementedError

    def branch(self, rows: Tensor, state: Any) -> tuple[Tensor, State]:
        """[P * n, k, heads/(tp cp), *] from P states -> outputs alike, P * n states after the last row."""
        raise NotImplementedError

    def output(self, mixed: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mixed rows [S/cp, B, heads/tp, *] and the projected rows -> [S/cp (/tp), B, hidden], bias."""
        raise NotImplementedError

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, packed_seq_params: Branches | None = None, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[S/cp (/tp), B, hidden] and the layout of all rows -> the same shape, bias."""
        layout = packed_seq_params
        assert isinstance(layout, Branches), "pass the layout of the rows as packed_seq_params="
        projected = self.project(hidden_states)
        rows = projected
        if self.cp_group.size() > 1:
            rows = to_heads(self.mixed_columns(projected), self.cp_group)
        main, branches = layout.split(rows)
        parts, handle = [], None
        if layout.main_len:
            mixed, handle = self.main(main)
            parts.append(mixed.transpose(0, 1))
            if layout.handles is not None:
                layout.handles[self.layer_number] = handle
        if layout.branch_rows:
            mixed = self._branches(branches, layout, handle)
            parts.append(layout.to_rows(mixed, rows.shape[1]))
        padding = rows.shape[0] - layout.num_rows
        if padding:
            parts.append(parts[0].new_zeros(padding, *parts[0].shape[1:]))
        mixed = torch.cat(parts) if len(parts) > 1 else parts[0]
        return self.output(to_rows(mixed, self.cp_group), projected)

    def mine(self, per_head: Tensor) -> Tensor:
        """Of a parameter's view [heads/tp, ...], the heads that this context parallel rank mixes."""
        return per_head.chunk(self.cp_group.size())[self.cp_group.rank()]

    def _branches(self, rows: Tensor, layout: Branches, handle: Handle | None) -> Tensor:
        """Outputs of branch rows [P * n, k, *local], from the main stream of this pass or from forked states."""
        if handle is not None:
            assert layout.places is not None, "branches of a main stream need their places"
            state: Any = handle.at(layout.places)
        else:
            assert layout.states is not None, "branches without a main stream need states"
            state = layout.states[self.layer_number]
        mixed, final = self.branch(rows, state)
        if layout.final_states is not None:
            layout.final_states[self.layer_number] = final
        return mixed

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Adds the mixer's own parameters to what Megatron's layers declare of themselves."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        own = self.own_parameters()
        axes = dict.fromkeys(own, 0)
        groups = {"tp_group": self.tp_group, "dp_cp_group": (metadata or {}).get("dp_cp_group")}
        return state | make_sharded_tensors_for_checkpoint(own, prefix, axes, sharded_offsets, **groups)


def sharded(local: Tensor, initialize: Initialize | None = None) -> nn.Parameter:
    """A parameter cut along axis 0 over tp. `initialize(full, generator)` fills the whole of it; None: as Megatron's
    parameters are filled."""
    parameter = nn.Parameter(local)
    set_tensor_model_parallel_attributes(parameter, True, 0, 1)
    return _filled(parameter, initialize)


def partial(local: Tensor, initialize: Initialize | None = None) -> nn.Parameter:
    """A parameter that every tp rank has whole and uses for its own heads: its gradients are summed over tp, by the
    mark (trainer/gradients.py). `initialize` as of `sharded`."""
    parameter = nn.Parameter(local)
    parameter.tp_partial = True  # type: ignore[attr-defined]
    return _filled(parameter, initialize)


def _filled(parameter: nn.Parameter, initialize: Initialize | None) -> nn.Parameter:
    if initialize is not None:
        parameter.initialize = initialize  # type: ignore[attr-defined]
    return parameter
