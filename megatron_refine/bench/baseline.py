"""Ratios of a benchmark as JSON, and today's held to them.

What is kept is a ratio of two kinds that ran side by side, with all that it depends on. Seconds are no criterion: they
belong to one machine on one day.
"""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_refine.config import Config, ConfigError
from megatron_refine.files import read, write_json

Ratios = Mapping[str, Mapping[str, float]]  # of what -> "fused / NTP" -> value
# relative, of what; a file may say others
TOLERANCE = {"seconds": 0.15, "saved bytes": 0.01}
KEPT = {
    "parallel": None,
    "data": {"seq_length"},
    "train": {"global_batch_size", "micro_batch_size", "precision", "recompute"},
    "refine": {"num_chunks", "num_rollouts", "rollout_len", "reward", "selection"},
    "update": None,
}


class Record:
    """Keep a benchmark's ratios in a file, and compare them with those of another. Both files are checked first."""

    def __init__(self, command: str, config: Config, world: int, out: Path | None = None, check: Path | None = None):
        """Raises ConfigError where a file cannot be used, or where `check` was measured with other settings."""
        self.outside: list[str] = []  # after `keep`: a line for each ratio that is not as it was
        self.facts: dict[str, Any] = {"command": command, "ranks": world, "settings": settings(config)}
        self._out, self._check, self._baseline = out, check, None
        if out and (out.is_dir() or not out.absolute().parent.is_dir()):
            raise ConfigError(f"--json={out}: cannot be written; name a file in a folder that exists")
        if check:
            self._baseline = load(check)
            if others := differences(self.facts, self._baseline):
                raise ConfigError("\n".join(f"--check={check}: measured with {line}" for line in others))

    def keep(self, ratios: Ratios, rounds: int) -> None:
        """Write the ratios, and compare them. On the first rank."""
        if self._out:
            facts = {**self.facts, "rounds": rounds, **circumstances(), "tolerance": TOLERANCE, "ratios": ratios}
            try:
                write_json(self._out, facts, indent=2)
            except OSError as error:
                raise ConfigError(f"--json={self._out}: cannot be written: {error.strerror}") from None
        if self._baseline:
            self.outside = [f"{self._check}: {line}" for line in outside(ratios, self._baseline)]


def settings(config: Config) -> dict[str, Any]:
    """Everything in the configuration that a ratio depends on."""
    found: dict[str, Any] = {"model": config.model.model_dump(mode="json")}
    for name, keys in KEPT.items():
        found[name] = getattr(config, name).model_dump(mode="json", include=keys)
    return found


def circumstances() -> dict[str, Any]:
    """What a ratio may depend on, and is not held to: machine, commit, versions."""
    from megatron_refine.platform import hardware
    from megatron_refine.report.history import PROJECT, commit, versions

    return {"machine": hardware.machine(), "commit": commit(PROJECT), "versions": versions()}


def load(path: Path) -> dict[str, Any]:
    """A file that `Record` wrote. Raises ConfigError."""
    try:
        found = json.loads(read(path))
        numbers = [v for group in found["ratios"].values() for v in group.values()]
        numbers += [found["tolerance"][group] for group in found["ratios"]]
        good = all(isinstance(v, int | float) and math.isfinite(v) and v > 0 for v in numbers) and found["settings"]
    except OSError as error:
        raise ConfigError(f"--check={path}: {error.strerror}; name a file that --json wrote") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise ConfigError(f"--check={path}: holds no ratios of a benchmark; name a file that --json wrote")
    return dict(found)


def differences(today: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[str]:
    """A line for each setting that the baseline has otherwise."""
    new, old = (_flat({key: facts.get(key) for key in ("ranks", "settings")}) for facts in (today, baseline))
    keys = [key for key in old if new.get(key) != old[key]]  # what is new since then had no other value
    return [f"{key.removeprefix('settings.')}={old[key]}, not {new.get(key)}" for key in keys]


def _flat(tree: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {key: tree}
    parts = (_flat(value, f"{key}.{name}" if key else name) for name, value in tree.items())
    return {key: value for part in parts for key, value in part.items()}


def outside(ratios: Ratios, baseline: Mapping[str, Any]) -> list[str]:
    """A line for each of the baseline's ratios that today's is above or below, or that was not measured today."""
    lines = []
    for group, kept in baseline["ratios"].items():
        allowed = baseline["tolerance"][group]
        for name, old in kept.items():
            new = ratios.get(group, {}).get(name)
            if new is None:
                lines.append(f"{name}, {group}: not measured today; the file has {old:.3f}")
            elif abs(new / old - 1) > allowed:
                side = "above" if new > old else "below"
                lines.append(
                    f"{name}, {group}: {new:.3f}, {abs(new / old - 1):.1%} {side} {old:.3f}; {allowed:.1%} are allowed"
                )
    return lines


def spelled(arguments: Sequence[str]) -> str:
    """A benchmark's command line, without what says where its ratios go."""
    kept, names = list[str](), ("--json", "--check")
    for before, word in zip(["", *arguments], arguments, strict=False):
        if before not in names and word not in names and not word.startswith(tuple(f"{name}=" for name in names)):
            kept.append(word)
    return shlex.join(["megatron-refine", "bench", *kept])
