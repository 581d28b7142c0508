"""Defects of Megatron-Core's optimizers."""

from typing import Any

import torch


def repair() -> None:
    """Mend all defects, for every optimizer that is built from now on."""
    _repair_groups()
    _repair_buckets()
    _repair_steps()


def norm_gradients(part: Any) -> list[torch.Tensor]:
    """Return the gradients that one of Megatron's optimizers counts into the norm, this rank's share of them."""
    get = "get_grads_for_grad_norm" if hasattr(part, "get_grads_for_grad_norm") else "get_main_grads_for_grad_norm"
    found: list[torch.Tensor] = getattr(part, get)()  # the second is its name up to 0.16
    return found


def _repair_groups() -> None:
    """Have the groups of a checkpoint found by what makes them groups.

    Megatron-Core 0.19.2 compares their rates too, so that a run could not go on with another one.
    """
    from megatron.core.optimizer import distrib_optimizer, optimizer

    for module in (distrib_optimizer, optimizer):
        module.param_group_identifier_keys = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")


def _repair_buckets() -> None:
    """Have the resharding format find each parameter's moments where several buckets of a buffer are padded.

    Each bucket is padded to a multiple of the ranks. Megatron-Core 0.16.1 to 0.19.2 collect the buckets without their
    padding and then look parameters up by their places with it: the moments in a checkpoint are those of neighbours.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = DistributedOptimizer.sharded_param_state_fully_reshardable

    def sharded(self: Any, *args: Any, **kwargs: Any) -> Any:
        padded = [buffer.param_index_map for buffer in self.buffers]
        for buffer in self.buffers:
            buffer.param_index_map = _without_padding(buffer)
        try:
            return original(self, *args, **kwargs)
        finally:
            for buffer, places in zip(self.buffers, padded, strict=True):
                buffer.param_index_map = places

    DistributedOptimizer.sharded_param_state_fully_reshardable = sharded


def _without_padding(buffer: Any) -> dict[Any, tuple[int, int, int]]:
    """Return parameter -> first element, end, bucket, in the buckets end to end without their padding."""
    padding, before = {}, 0
    for bucket in buffer.buckets:
        padding[bucket.bucket_id] = bucket.offset - before
        before += bucket.numel_unpadded
    return {p: (start - padding[i], end - padding[i], i) for p, (start, end, i) in buffer.param_index_map.items()}


def _repair_steps() -> None:
    """Give each parameter its own Adam step when a checkpoint is loaded without TE or apex, on any device.

    Megatron-Core 0.16.1 fails to load `step` of a torch AdamW, and its load_state_dict hands all parameters one shared
    step tensor, which then counts every parameter's update: a silently wrong bias correction after a resume.
    """
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    optimizer = distrib_optimizer.DistributedOptimizer
    original_set, original_load = optimizer._set_main_param_and_optimizer_states, optimizer.load_state_dict

    def set_states(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        step = state.pop("step", None)
        with torch.no_grad():  # the main parameters of an fp32 model are leaves
            original_set(self, model_param, tensors)
        if step is not None:
            fused = self.optimizer.param_groups[group].get("fused")  # counts where the parameter lies
            state["step"] = step.to(next(iter(state.values())).device) if fused else step

    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        original_load(self, state_dict)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].detach().clone()

    optimizer._set_main_param_and_optimizer_states = set_states
    optimizer.load_state_dict = load_state_dict
