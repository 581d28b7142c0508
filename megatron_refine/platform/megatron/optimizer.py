"""Defects of Megatron-Core's distributed optimizer."""

from typing import Any

import torch


def repair() -> None:
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
