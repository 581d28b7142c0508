"""One optimizer step over micro-batches, through Megatron's schedules, data parallelism and distributed optimizer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_refine.config import Config
from megatron_refine.trainer.errors import NonFiniteError
from megatron_refine.trainer.parallel import Ranks, broadcast_from_last_stage, sum_over

Forward = Callable[[DistributedDataParallel, Any], Any]
"""forward(model, item) -> what the last stage's loss needs, or hidden rows before it."""
Loss = Callable[[Any, Any], tuple[Tensor, Tensor]]
"""loss(output, item) -> (scalar: this micro-batch's part of the global loss, sums [M] to report)."""


@dataclass(frozen=True)
class UpdateResult:
    sums: Tensor  # [M] fp64, the loss function's sums over all micro-batches and data-parallel ranks
    grad_norm: float
    skipped: bool  # the gradient was not finite: parameters and moments are as before


class Updater:
    """The model with its optimizer and learning-rate schedule."""

    def __init__(self, config: Config, model: DistributedDataParallel, ranks: Ranks):
        self.config, self.model, self.ranks = config, model, ranks
        self.optimizer = _build_optimizer(config, model)
        self.scheduler = _build_scheduler(config, self.optimizer)
        self.skipped_in_a_row = 0
        model.config.finalize_model_grads_func = finalize_gradients
        model.config.grad_scale_func = self.optimizer.scale_loss

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def update(self, items: Sequence[Any], forward: Forward, loss: Loss, num_rows: int, num_sums: int) -> UpdateResult:
        """Forward and backward of every micro-batch, then one optimizer step unless the gradient is not finite.

        `loss` returns parts that add up to the global loss over micro-batches and data-parallel ranks (global means,
        not means of means). `num_rows`: rows a sequence that travel between pipeline stages. Raises NonFiniteError
        after more than train.max_skipped_steps skipped steps in a row.
        """
        sums = self._accumulate(items, forward, loss, num_rows, num_sums)
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        skipped = not (math.isfinite(norm) and bool(torch.isfinite(sums).all()))
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if not skipped:
            self.optimizer.step()
        elif self.skipped_in_a_row > self.config.train.max_skipped_steps:
            raise NonFiniteError(
                f"loss or gradient not finite in {self.skipped_in_a_row} steps in a row (gradient norm {norm}); the "
                "checkpoints are intact: lower optimizer.lr or inspect the data, then run the same command again"
            )
        return UpdateResult(sums, norm, skipped)

    def _accumulate(self, items: Sequence[Any], forward: Forward, loss: Loss, num_rows: int, num_sums: int) -> Tensor:
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        # the schedule divides by the number of micro-batches, the gradient reduction by that of data-parallel ranks
        scale = len(items) * self.ranks.dp

        def forward_step(iterator: Any, model: Any) -> Any:
            item = next(iterator)

            def scaled_loss(output: Any) -> tuple[Tensor, Tensor]:
                value, sums = loss(output, item)
                return value * scale, sums.detach().double()

            return forward(model, item), scaled_loss

        collected = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(items),
            model=self.model,
            num_microbatches=len(items),
            seq_length=num_rows + -num_rows % self.ranks.tp,
            micro_batch_size=self.config.train.micro_batch_size,
            forward_only=False,
        )
        device = next(self.model.parameters()).device
        local = (
            torch.stack(collected).sum(0) if collected else torch.zeros(num_sums, dtype=torch.float64, device=device)
        )
        return broadcast_from_last_stage(sum_over(local, self.ranks.dp_group), self.ranks)

    def advance_schedule(self) -> None:
        """Once a batch, however many optimizer steps it took."""
        self.scheduler.step(1)


def finalize_gradients(models: list[Any], *args: Any, **kwargs: Any) -> None:
    """Megatron's reductions, then the sum over tp of gradients that it does not know to be partial (per-head norms)."""
    from megatron.core import parallel_state

    finalize_model_grads(models, *args, **kwargs)
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return
    grads = [p.main_grad for model in models for p in model.parameters() if getattr(p, "tp_partial", False)]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat, group=group)
    for grad, total in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(total.view_as(grad))


def _build_optimizer(config: Config, model: DistributedDataParallel) -> Any:
    settings = config.optimizer
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        clip_grad=settings.clip_grad,
        bf16=model.config.bf16,
        params_dtype=model.config.params_dtype,
        use_distributed_optimizer=True,
    )
    overrides = get_standard_config_overrides(optimizer_config)
    return get_megatron_optimizer(optimizer_config, [model], config_overrides=overrides)


def _build_scheduler(config: Config, optimizer: Any) -> OptimizerParamScheduler:
    """Megatron's scheduler also applies the weight-decay multipliers: without it, norms would decay."""
    settings, steps = config.optimizer, config.train.steps
    constant = settings.schedule == "constant"
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.lr if constant else settings.min_lr,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=max(steps, settings.warmup_steps + 1),
        lr_decay_style=settings.schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
    )
