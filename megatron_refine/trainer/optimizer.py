"""One optimizer step over micro-batches, through Megatron's schedules, data parallelism and distributed optimizer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor
from torch.nn.utils import get_total_norm

from megatron_refine.config import Config
from megatron_refine.errors import NonFiniteError
from megatron_refine.estimate.flops import total_steps
from megatron_refine.platform import hardware
from megatron_refine.platform.megatron.optimizer import norm_gradients
from megatron_refine.trainer import muon
from megatron_refine.trainer.gradients import Forward, Loss, accumulate
from megatron_refine.trainer.model import unwrap
from megatron_refine.trainer.parallel import Ranks


@dataclass(frozen=True)
class UpdateResult:
    sums: list[float]  # the loss function's, over all micro-batches and data-parallel ranks
    grad_norm: float
    skipped: bool  # the gradient was not finite: parameters and moments are as before


class Updater:
    """The model with its optimizer and learning-rate schedule."""

    def __init__(self, config: Config, model: DistributedDataParallel, ranks: Ranks):
        self.config, self.model, self.ranks = config, model, ranks
        self.optimizer = _build_optimizer(config, model)
        self.scheduler = _build_scheduler(config, self.optimizer)
        self.skipped_in_a_row = 0
        self._start_states()
        model.config.grad_scale_func = self.optimizer.scale_loss

    @property
    def parts(self) -> list[Any]:
        """Megatron's optimizers, one a set of parameters."""
        return getattr(self.optimizer, "chained_optimizers", [self.optimizer])

    def _start_states(self) -> None:
        """Give torch's Adam, and Muon, the state of their first step now: if it is skipped, a checkpoint needs that."""
        for part in self.parts:
            adam = isinstance(part.optimizer, torch.optim.Adam)
            if adam or self.config.optimizer.kind == "muon":
                part.init_state_fn(part.optimizer, part.config)
            for state in part.optimizer.state.values() if adam else ():
                state.setdefault("step", torch.tensor(0.0))

    def _torch_adams(self) -> list[torch.optim.Adam]:
        """Those of torch, of which AdamW is one; fused Adams of others keep their own state."""
        return [part.optimizer for part in self.parts if isinstance(part.optimizer, torch.optim.Adam)]

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def update(self, items: Sequence[Any], forward: Forward, loss: Loss, num_rows: int, num_sums: int) -> UpdateResult:
        """`accumulate` a mini-batch's gradient, then one optimizer step unless it is not finite.

        Raises NonFiniteError after more than train.max_skipped_steps skipped steps in a row.
        """
        self.optimizer.zero_grad()
        sums = accumulate(self.model, items, forward, loss, num_rows, num_sums, self.ranks)
        self.optimizer.prepare_grads()
        # the one time that an update waits for the device
        squared, *found = torch.cat([self._squared_norm().double(), sums]).tolist()
        norm = squared**0.5
        skipped = not all(map(math.isfinite, (norm, *found)))
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if not skipped:
            self._step(norm)
        elif self.skipped_in_a_row > self.config.train.max_skipped_steps:
            raise NonFiniteError(
                f"loss or gradient not finite in {self.skipped_in_a_row} steps in a row (gradient norm {norm}); the "
                "checkpoints are intact: run again with a lower optimizer.lr, or after a look at the data"
            )
        return UpdateResult(found, norm, skipped)

    @torch.no_grad()
    def _squared_norm(self) -> Tensor:
        """Of the whole model's gradient, [1]. Megatron's own way, without Transformer Engine, reads a value of every
        parameter."""
        grads = [grad for part in self.parts for grad in norm_gradients(part)]
        device = next(self.model.parameters()).device
        norm = get_total_norm(grads, foreach=hardware.has_gpu()) if grads else torch.zeros((), device=device)
        squared = norm[None] ** 2
        dist.all_reduce(squared, group=self.optimizer.get_grad_stats_parallel_group())
        return squared

    @torch.no_grad()
    def _step(self, norm: float) -> None:
        """Clip gradients of this norm to optimizer.clip_grad, then make the step."""
        limit = self.config.optimizer.clip_grad
        scale = limit / (norm + 1e-6)
        if 0 < limit and scale < 1:
            grads = [p.grad for part in self.parts for p in part.get_parameters() if p.grad is not None]
            torch._foreach_mul_(grads, scale)
        if hardware.has_gpu():
            for adam in self._torch_adams():
                fuse(adam)
        inner = unwrap(self.model)
        inner.complete()
        self.optimizer.step_with_ready_grads()
        if inner.gathering:
            inner.gathering.owe()

    def weights(self) -> list[Tensor]:
        """A copy of this rank's weights, to `restart` from."""
        unwrap(self.model).complete()
        return [parameter.detach().clone() for parameter in self.model.parameters()]

    @torch.no_grad()
    def restart(self, weights: list[Tensor]) -> None:
        """Return to `weights` as before any step: bit by bit, moments and counts of steps at zero."""
        unwrap(self.model).complete()
        for parameter, value in zip(self.model.parameters(), weights, strict=True):
            parameter.copy_(value)
        self.optimizer.reload_model_params()
        self.skipped_in_a_row = 0
        for part in self.parts:
            for group in part.optimizer.param_groups:
                if "step" in group:  # where fused Adams count
                    group["step"] = 0
            for state in part.optimizer.state.values():
                for value in (v for v in state.values() if isinstance(v, Tensor)):
                    value.zero_()

    def advance_schedule(self) -> None:
        """Once a batch, however many optimizer steps it took."""
        self.scheduler.step(1)


def fuse(adam: torch.optim.Adam) -> None:
    """Have torch's Adam take a few kernels for all parameters, and count its steps where they lie. Again before each
    step: a checkpoint may come from where it did neither."""
    for group in adam.param_groups:
        if group["fused"]:
            continue
        group.update(fused=True, foreach=False)
        for parameter in group["params"]:
            state = adam.state[parameter]
            state["step"] = state["step"].to(parameter.device)


def _build_optimizer(config: Config, model: DistributedDataParallel) -> Any:
    settings, own = config.optimizer, {}
    if settings.kind == "muon":
        muon.mark(model, config)
        own = muon.settings(config)
    optimizer_config = OptimizerConfig(
        optimizer=settings.kind,
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        clip_grad=settings.clip_grad,
        bf16=model.config.bf16,
        params_dtype=model.config.params_dtype,
        use_distributed_optimizer=settings.distributed,
        **own,
    )
    overrides = get_standard_config_overrides(optimizer_config)
    return get_megatron_optimizer(optimizer_config, [model], config_overrides=overrides)


def _build_scheduler(config: Config, optimizer: Any) -> OptimizerParamScheduler:
    """Megatron's scheduler also applies the weight-decay multipliers: without it, norms would decay."""
    settings, steps = config.optimizer, total_steps(config)
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
