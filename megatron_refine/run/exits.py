"""How a run ends: exit codes, and the line that goes with each failure."""

from megatron_refine.convert.errors import ConversionError
from megatron_refine.engine.errors import EngineError
from megatron_refine.errors import (
    CheckpointError,
    FencedError,
    LostError,
    MismatchError,
    NonFiniteError,
    disk_failed,
    lost_rank,
)
from megatron_refine.files import TornError
from megatron_refine.run.watchdog import EXIT_LOST

CODES: dict[type[Exception], int] = {
    NonFiniteError: 3, FencedError: 7, CheckpointError: 4, ConversionError: 4, TornError: 4, EngineError: 5,
    MismatchError: 6, LostError: EXIT_LOST,
}  # fmt: skip


def ending_of(error: Exception, where: str, speaks: bool) -> tuple[int, str] | None:
    """The exit code of a failure and the line for the screen, "" where another rank says it; None: not foreseen.

    where: rank and phase; speaks: on the rank that speaks for all.
    """
    if isinstance(error, OSError) and not isinstance(error, (ConnectionError, TimeoutError)):
        error = disk_failed(error)
    for kind, code in CODES.items():
        if isinstance(error, kind):
            return code, str(error) if speaks or getattr(error, "alone", False) else ""
    if lost_rank(error):
        cause = " ".join(str(error).split())[-160:]
        return EXIT_LOST, f"{where}: lost another rank: {cause}; run the same command to go on from the last checkpoint"
    return None
