"""Which layouts of N GPUs a run fits on, and which of them is fastest."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_refine.config import Config, ConfigError, LayoutError, Parallel, check_world_size, cross_check
from megatron_refine.estimate.hardware import Hardware
from megatron_refine.estimate.memory import RankMemory, fullest_rank
from megatron_refine.estimate.timing import StepTime, step_time

RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Layout:
    config: Config
    dp: int
    memory: RankMemory
    time: StepTime

    def fits(self, hardware: Hardware) -> bool:
        return self.memory.total <= hardware.memory_bytes * hardware.usable

    @property
    def name(self) -> str:
        """Such as `tp 8 sp, cp 1, pp 1, dp 8, recompute full`."""
        p = self.config.parallel
        return (
            f"tp {p.tp}{' sp' if p.sp else ''}, cp {p.cp}, pp {p.pp}, dp {self.dp}, "
            f"recompute {self.config.train.recompute}"
        )


def layout_of(config: Config, world: int, hardware: Hardware) -> Layout:
    """Raises ConfigError where the ranks do not fit."""
    dp = check_world_size(config, world)
    return Layout(config, dp, fullest_rank(config, dp), step_time(config, dp, hardware))


def layouts(config: Config, world: int, hardware: Hardware) -> tuple[list[Layout], dict[str, int]]:
    """Return the layouts that fit, the fastest (at worst) first; and for each reason, how many do not.

    tp stays within a node; sequence parallelism goes with tp. `update.mode=fused` becomes auto, for pp > 1.
    """
    found, refused = list[Layout](), dict[str, int]()
    for candidate in _candidates(config, world, hardware):
        try:
            layout = layout_of(cross_check(candidate), world, hardware)
        except ConfigError as error:
            _count(refused, error.rule if isinstance(error, LayoutError) else str(error).splitlines()[0])
            continue
        if layout.fits(hardware):
            found.append(layout)
        else:
            _count(refused, f"more than {hardware.usable:.0%} of a GPU's memory")
    return sorted(found, key=lambda layout: layout.time.total[1]), refused


def _candidates(config: Config, world: int, hardware: Hardware) -> Iterator[Config]:
    sizes = [1 << i for i in range(world.bit_length())]
    for tp in (s for s in sizes if s <= hardware.gpus_per_node):
        for cp in (s for s in sizes if tp * s <= world):
            for pp in (s for s in sizes if tp * cp * s <= world):
                if world % (tp * cp * pp):
                    continue
                for recompute in RECOMPUTE:
                    parallel = Parallel(tp=tp, sp=tp > 1, cp=cp, pp=pp)
                    train = config.train.model_copy(update={"recompute": recompute})
                    update = config.update
                    if update.mode == "fused":
                        update = update.model_copy(update={"mode": "auto"})
                    yield config.model_copy(update={"parallel": parallel, "train": train, "update": update})


def _count(reasons: dict[str, int], reason: str) -> None:
    reasons[reason] = reasons.get(reason, 0) + 1
