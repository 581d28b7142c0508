"""How a run begins: the ranks meet, and what the first of them finds wrong ends all of them alike."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile
from typing import TypeVar, cast

from megatron_refine.checkpoint.ownership import Ownership, attempt_token
from megatron_refine.config import Config, ConfigError
from megatron_refine.errors import FULL, CheckpointError, FencedError, disk_failed
from megatron_refine.exchange import everyone
from megatron_refine.phases.sources import Sources
from megatron_refine.platform import rendezvous
from megatron_refine.run import preflight
from megatron_refine.trainer.parallel import join

_KINDS: dict[str, type[Exception]] = {
    "ConfigError": ConfigError, "FencedError": FencedError, "CheckpointError": CheckpointError,
}  # fmt: skip
T = TypeVar("T")
BLOCK = 1 << 16  # bytes: a run that cannot write as much is not begun


def claim(config: Config, checked: bool = False) -> Ownership:
    """Join the group, prepare the data on rank 0, and take the run's folder over from earlier attempts.

    checked: this process has had the configuration's preflight.

    However long rank 0 prepares, the others wait. Raises ConfigError, FencedError or CheckpointError on every rank.
    """
    join(config)
    first = rendezvous.global_rank() == 0
    found = json.loads(rendezvous.from_first(json.dumps(_prepare(config, checked)) if first else None))
    if "error" in found:
        raise _KINDS[found["error"]](found["message"])
    return Ownership(Path(config.run.dir), found["token"])


def everywhere(action: Callable[[], T]) -> T:
    """Run a local `action` on every rank, which may find other files than the first one. Its result, or one ConfigError
    or CheckpointError on every rank."""
    result, failure = None, None
    try:
        result = action()
    except (ConfigError, CheckpointError) as error:
        failure = _kind(error), str(error)
    for rank, found in enumerate(everyone(failure)):
        if found is not None:
            kind, message = found
            raise _KINDS[kind](f"{message} (rank {rank})" if rank else message)
    return cast(T, result)


def _kind(error: Exception) -> str:
    return next(name for name, kind in _KINDS.items() if isinstance(error, kind))


def _prepare(config: Config, checked: bool = False) -> dict[str, object]:
    """On rank 0: {"token": of this attempt} or {"error": kind, "message": text}."""
    folder, token = Path(config.run.dir), attempt_token()
    try:
        _check_writable(folder)
        if not checked:
            preflight.check(config)
        Sources.of(config, _tell)  # the other ranks find the rows
        Ownership(folder, token).claim(_tell)
    except OSError as error:
        return {"error": "CheckpointError", "message": str(disk_failed(error))}
    except tuple(_KINDS.values()) as error:
        return {"error": _kind(error), "message": str(error)}
    return {"token": token}


def _tell(line: str) -> None:
    """A line on the screen, before there is a run folder."""
    print(line, flush=True)


def _check_writable(folder: Path) -> None:
    """Raises ConfigError where the run folder cannot be written, CheckpointError where its disk is full."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as file:
            file.write(bytes(BLOCK))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno in FULL:
            raise disk_failed(OSError(error.errno, error.strerror, str(folder))) from None
        raise ConfigError(f"run.dir={folder}: cannot be written: {error.strerror}; name another folder") from None
