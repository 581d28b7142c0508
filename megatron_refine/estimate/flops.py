"""The matmul FLOPs of one step, stage by stage: why a REFINE step costs little more than next-token prediction alone.

These are the FLOPs that the algorithm asks for, as in the model FLOPs utilisation (MFU, arXiv 2204.02311 appendix B): a
backward pass is two forward passes, recomputed activations are not counted.
"""

from dataclasses import dataclass

from megatron_refine.config import Config
from megatron_refine.models import cost, family


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one batch over all ranks."""

    ntp: int  # a whole step of next-token prediction
    score: int
    rollout: int
    rescore: int
    update: int

    @property
    def refine(self) -> int:
        """A whole REFINE step."""
        return self.score + self.rollout + self.rescore + self.update

    @property
    def ratio(self) -> float:
        """A REFINE step / a step of next-token prediction."""
        return self.refine / self.ntp


def step_flops(config: Config) -> StepFlops:
    """FLOPs of a step of `train.global_batch_size` full sequences.

    The fused update is the backward pass of scoring and rescoring; the two-pass update first runs their rows again.
    With `engine.lag=1` the next batch is scored as well, for its positions.
    """
    main, forks, branch, decode = _forward(config)
    packed = main + forks + branch
    size = config.train.global_batch_size
    return StepFlops(
        ntp=size * 3 * main,
        score=size * (main * (1 + config.engine.lag) + forks),
        rollout=size * decode,
        rescore=size * branch,
        update=size * (2 if config.fused else 3) * packed,
    )


def batch_flops(config: Config, refine: bool) -> int:
    """FLOPs of a batch of the run's phase, REFINE or next-token prediction; answers' decoding aside."""
    step = step_flops(config)
    inner, outer = (step.refine if refine else step.ntp), step.ntp
    if config.train.phase != "posttrain":
        return inner
    return outer + inner * config.task.inner_step


def matched_ratio(config: Config) -> float:
    """FLOPs of a batch of the REFINE run / of this baseline: the passes over data that `train.match=compute` allows."""
    refine = config.model_copy(
        update={"refine": config.refine.model_copy(update={"enabled": True}),
                "task": config.task.model_copy(update={"inner_step": True})}
    )  # fmt: skip
    return batch_flops(refine, refine=True) / batch_flops(config, refine=False)


def total_steps(config: Config) -> int:
    """Batches of a run: train.steps, and of a baseline of equal compute as many more as its batches cost less."""
    steps, start = config.train.steps, min(config.refine.start_step, config.train.steps)
    if config.refine.enabled or config.train.match != "compute":
        return steps
    return start + round((steps - start) * matched_ratio(config))


def _forward(config: Config) -> tuple[int, int, int, int]:
    """Forward FLOPs a sequence: the main stream, its forks, the branch rows, the rollouts token by token."""
    r, model = config.refine, config.model
    head, length, rollouts = cost.head_flops(model), config.data.seq_length, r.num_chunks * r.num_rollouts

    def layers(rows: int, stream: int, before: int = 0) -> int:
        return rows * cost.stack_flops(model, stream, before)

    main = layers(length, length) + length * head
    if not r.enabled:
        return main, 0, 0, 0
    later_heads = rollouts * (r.rollout_len - 1) * head  # the first token is predicted by a main row
    forks = r.num_chunks * sum(layer.cost.fork_flops() for layer in family.layers(model))
    before = length // 2  # of a branch, on average
    branch = layers(rollouts * r.rollout_len, r.rollout_len, before) + later_heads
    decode = layers(rollouts * r.rollout_len, 1, before) + later_heads + r.num_chunks * head
    return main, forks, branch, decode
