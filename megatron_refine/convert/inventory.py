"""Every tensor accounted for: what a folder holds against what the model has."""

import re
from collections.abc import Mapping

from megatron_refine.convert.errors import ConversionError
from megatron_refine.convert.tensorfile import Spec
from megatron_refine.models.hf import Format, Shape


def stored_names(described: Format, present: set[str], expected: set[str]) -> dict[str, str]:
    """Today's name -> name in the folder, of every expected tensor that is there under either."""
    old = [(_pattern(before), now) for before, now in described.renamed.items()]
    found = {name: name for name in expected & present}
    for name in sorted(present - expected):
        for pattern, now in old:
            match = pattern.fullmatch(name)
            if match and (modern := now.format(*match.groups())) in expected and modern not in found:
                found[modern] = name
    return found


def todays_name(described: Format, name: str) -> str | None:
    """The name that a tensor of a folder has today; None where no computation reads it."""
    if unused_names(described, {name}):
        return None
    matches = ((_pattern(before).fullmatch(name), now) for before, now in described.renamed.items())
    return next((now.format(*match.groups()) for match, now in matches if match), name)


def unused_names(described: Format, names: set[str]) -> set[str]:
    """Return the names that no computation reads."""
    patterns = [_pattern(name) for name in described.unused]
    return {name for name in names if any(pattern.fullmatch(name) for pattern in patterns)}


def check(where: str, found: Mapping[str, Spec | Shape], expected: Mapping[str, Shape]) -> None:
    """Names and shapes must be equal. Raises ConversionError naming what is missing, left over or of another shape."""
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        parts = [f"{word} {_some(names)}" for word, names in (("missing", missing), ("not known", extra)) if names]
        raise ConversionError(f"{where}: tensors do not match the model: {'; '.join(parts)}; check the configuration")
    for name, shape in expected.items():
        spec = found[name]
        actual = spec.shape if isinstance(spec, Spec) else spec
        if tuple(actual) != tuple(shape):
            raise ConversionError(
                f"{where}: {name}: shape {list(actual)}, the configuration says {list(shape)}; correct either"
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\{\}", r"(\d+)").replace(r"\*", "(.*)"))
