"""Seconds of data parallel communication that hide behind the passes of a GPU: see `train.overlap`."""

import math
from collections.abc import Mapping

from megatron_refine.config import Config
from megatron_refine.models import cost


def hidden_seconds(
    config: Config, updates: int, refine: bool, exchanged: Mapping[tuple[str, str], float], forward: float
) -> float:
    """Return what of a batch's collectives takes no time of its own.

    The backward pass of an optimizer step's last micro-batch hides the reduction of its gradients, all but that of the
    last bucket. The first forward pass after a step hides the gathering of its weights, all but that of the first
    bucket; where servers are sent the weights, they are gathered before it.

    Args: exchanged, (axis, operation) -> seconds of a batch's collectives; forward, seconds of a micro-batch's forward
    pass, of which a backward pass takes twice as many.
    """
    if config.train.overlap == "false":
        return 0.0
    p = config.parallel
    count = cost.rank_parameters(config.model, p, p.pp - 1)
    share = 1 - 1 / max(1, math.ceil(count / (config.train.bucket_millions * 1e6)))
    sent = refine and config.engine.kind == "sglang"
    reduced, gathered = (exchanged.get(("dp", op), 0.0) * share for op in ("reduce_scatter", "all_gather"))
    gathered *= (updates - sent) / updates
    return min(reduced, updates * 2 * forward) + min(gathered, (updates - sent) * forward)
