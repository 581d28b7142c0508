"""Logging to Weights & Biases. Training never ends, stalls or loses a row of metrics.jsonl because of it.

The package is imported where it is used alone: it takes seconds. Its files go into the run's folder.
"""

import contextlib
import os
import secrets
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_refine.config import Config, ConfigError
from megatron_refine.files import TornError, read_json, write_json

IDENTITY = "wandb.json"  # of the run there: all attempts log into one
START_SECONDS, END_SECONDS = 20.0, 60.0  # until a server that does not answer is done without
REFUSED = ("not logged in", "401", "403", "nvalid", "ermission")  # of what servers say of a wrong key
_unreachable = ""  # why, where `check` found no server


def check(config: Config) -> None:
    """Raise ConfigError where the run cannot log as it is told to. A server that does not answer is no such case."""
    global _unreachable
    if config.run.wandb == "off":
        return
    _give_folders(Path(config.run.dir))
    try:
        import wandb
    except ImportError as error:
        remedy = "pip install megatron-refine[wandb], or set run.wandb=off"
        raise ConfigError(f"run.wandb={config.run.wandb}: {error}; {remedy}") from None
    if config.run.wandb == "offline":
        return
    remedy = "set WANDB_API_KEY, run `wandb login`, or set run.wandb=offline"
    try:
        wandb.setup(settings=wandb.Settings(silent=True))
    except Exception as error:  # of its variables and files, a key with a blank for one; no server is asked yet
        raise ConfigError(f"run.wandb=online: its settings are refused: {_line(error)}; {remedy}") from None
    try:
        if not wandb.login(prompt=False, verify=True):
            raise ConfigError(f"run.wandb=online: there is no API key: {remedy}")
    except (wandb.Error, OSError, RuntimeError) as error:
        text = _line(error)
        if any(sign in text for sign in REFUSED):
            raise ConfigError(f"run.wandb=online: the API key is refused: {text}; {remedy}") from None
        _unreachable = text
    except ConfigError:
        raise
    except Exception as error:  # what Python's reader of .netrc finds
        raise ConfigError(f"run.wandb=online: the API key cannot be read: {_line(error)}; {remedy}") from None


class Tracking:
    """The run at Weights & Biases. `say` is told, once, when it can no longer be logged."""

    def __init__(self, config: Config, say: Callable[[str], object]):
        self.config, self.say, self.folder = config, say, Path(config.run.dir)
        self._run: Any = None
        online = config.run.wandb == "online"
        cause = _unreachable if online else ""
        if online and not cause:
            cause = self._start("online")
        if not online or cause:
            failed = self._start("offline")
            place = self.folder / "wandb"
            if failed:
                say(f"wandb: cannot start: {failed}; this attempt is not logged there")
            elif cause:
                say(f"wandb: {cause}; this attempt is logged offline: send it with `wandb sync {place}/offline-run-*`")
        elif self._run is not None:
            say(f"wandb: {self._run.url}")

    def log(self, row: Mapping[str, Any]) -> None:
        """Log the metrics of a step; of several attempts at it the last counts."""
        self._try(lambda: self._run.log(dict(row)))

    def finish(self, code: int) -> None:
        """End the attempt, by the command's exit code. Waits for the server END_SECONDS at most."""
        self._try(lambda: self._run.finish(exit_code=code))
        self._run = None

    def _start(self, mode: Literal["online", "offline"]) -> str:
        """Start the run there. Return what went wrong, in one line; "" where nothing did."""
        import wandb

        run = self.config.run
        settings = wandb.Settings(
            silent=True, console="off", init_timeout=START_SECONDS, finish_timeout=END_SECONDS, root_dir=run.dir
        )  # fmt: skip
        try:
            self._run = wandb.init(
                project=run.wandb_project, entity=run.wandb_entity or None, group=run.wandb_group or None,
                tags=run.wandb_tags or None, name=self.folder.resolve().name, dir=run.dir, mode=mode,
                id=_identity(self.folder), resume="allow", settings=settings,
                config=self.config.model_dump(serialize_as_any=True),
            )  # fmt: skip
            self._run.define_metric("*", step_metric="step")  # its own counter would drop the steps that are done again
        except Exception as error:  # whatever it is: a run trains without it
            return _line(error)
        return ""

    def _try(self, action: Callable[[], object]) -> None:
        if self._run is None:
            return
        try:
            action()
        except Exception as error:
            self._run = None
            with contextlib.suppress(Exception):  # or its hook at the end of the process fails the same way
                import wandb

                wandb.teardown()
            self.say(
                f"wandb: {_line(error)}; from here on this attempt is not logged there, metrics.jsonl has all of it"
            )


def _identity(folder: Path) -> str:
    """Return the run's id there, which is kept in its folder."""
    path = folder / IDENTITY
    try:
        return str(read_json(path)["id"])
    except (OSError, TornError, KeyError, TypeError):
        identity = secrets.token_hex(4)
        write_json(path, {"id": identity})
        return identity


def _give_folders(run: Path) -> None:
    """Let settings and caches go into the run's folder where no home can be written, as in a container."""
    try:
        with tempfile.TemporaryFile(dir=Path.home()):
            return
    except (OSError, RuntimeError):  # no such folder; no name for this user
        own = run.absolute() / "wandb"
        for kind in ("CONFIG", "CACHE", "DATA"):
            os.environ.setdefault(f"WANDB_{kind}_DIR", str(own / kind.lower()))
        os.environ.setdefault("NETRC", str(own / "netrc"))


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
