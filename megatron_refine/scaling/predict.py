"""The estimator's weak scaling: the fastest layout of each number of GPUs, the batch growing with it."""

from collections.abc import Sequence

from megatron_refine import markdown
from megatron_refine.config import ConfigError, load
from megatron_refine.estimate.hardware import Hardware
from megatron_refine.estimate.layouts import layouts
from megatron_refine.estimate.plan import throughput
from megatron_refine.models.family import FAMILIES

HEADS = ("GPUs", "batch", "layout", "GiB a GPU", "step, s", "tokens/s a GPU", "MFU", "efficiency")


def table(files: Sequence[str], overrides: Sequence[str], worlds: Sequence[int]) -> str:
    """Markdown. train.global_batch_size and update.mini_batch_size are those of the first number of GPUs.

    Raises ConfigError where no layout fits.
    """
    hardware, base, first = Hardware(), load(list(files), list(overrides), FAMILIES), None
    rows = []
    for world in worlds:
        factor = world / worlds[0]
        batch, mini = (round(x * factor) for x in (base.train.global_batch_size, base.update.mini_batch_size))
        config = load(
            list(files), [*overrides, f"train.global_batch_size={batch}", f"update.mini_batch_size={mini}"], FAMILIES
        )
        found, refused = layouts(config, world, hardware)
        if not found:
            raise ConfigError(f"{world} GPUs: no layout fits: {'; '.join(refused)}")
        best = found[0]
        (fast, slow), (high, low) = throughput(best, world, hardware)
        first = first or slow
        seconds = "{:.1f}-{:.1f}".format(*best.time.total)
        rows.append([
            str(world), str(batch), best.name, f"{best.memory.total / 2**30:.0f}", seconds,
            f"{slow:,.0f}-{fast:,.0f}", f"{low:.0%}-{high:.0%}", f"{slow / first:.0%}",
        ])  # fmt: skip
    return markdown.table(HEADS, rows)
