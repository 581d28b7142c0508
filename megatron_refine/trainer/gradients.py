"""Gradients of a mini-batch: Megatron's schedule over its micro-batches, then the reductions over ranks."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_refine.records import Output
from megatron_refine.trainer.parallel import Ranks, from_last_stage, sum_over

Forward = Callable[[DistributedDataParallel, Any], Output]
"""forward(model, item) -> what this pipeline stage has of the pass."""
Loss = Callable[[Output, Any], tuple[Tensor, Tensor]]
"""loss(output, item) -> (scalar: this micro-batch's part of the global loss, sums [M] to report)."""


def accumulate(
    model: DistributedDataParallel, items: Sequence[Any], forward: Forward, loss: Loss, num_rows: int, num_sums: int,
    ranks: Ranks,
) -> Tensor:  # fmt: skip
    """Forward and backward of every micro-batch; the reduced gradient of their summed losses is left in the model.

    `loss` returns parts that add up to the global loss over micro-batches and data-parallel ranks: global means, not
    means of means. num_rows: rows a sequence that travel between pipeline stages. Returns the loss function's sums
    [num_sums] in fp64, over all micro-batches and ranks.
    """
    # the schedule divides by the number of micro-batches, the gradient reduction by that of data-parallel ranks
    scale = len(items) * ranks.dp

    def forward_step(iterator: Any, model: Any) -> Any:
        item = next(iterator)

        def scaled_loss(output: Any) -> tuple[Tensor, Tensor]:
            value, sums = loss(output, item)
            return value * scale, sums.detach().double()

        output = forward(model, item)
        return (output if output.hidden is None else output.hidden), scaled_loss  # what the schedule sends is a tensor

    model.zero_grad_buffer()
    collected = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(items),
        model=model,
        num_microbatches=len(items),
        seq_length=num_rows + -num_rows % (ranks.cp * (ranks.tp if model.config.sequence_parallel else 1)),
        micro_batch_size=len(items[0].batch.tokens),
        forward_only=False,
    )
    device = next(model.parameters()).device
    local = torch.stack(collected).sum(0) if collected else torch.zeros(num_sums, dtype=torch.float64, device=device)
    return from_last_stage(sum_over(local, ranks.dp_group), ranks.pp_group)


def finalize_gradients(models: list[Any], *args: Any, **kwargs: Any) -> None:
    """Megatron's reductions, then the sum over tp of gradients that it does not know to be partial (per-head norms,
    replicated key heads)."""
    finalize_model_grads(models, *args, **kwargs)
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return
    grads = [p.main_grad for model in models for p in model.parameters() if getattr(p, "tp_partial", False)]
    if not grads:  # on every rank of the group
        return
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat, group=group)
    for grad, total in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(total.view_as(grad))
