"""config.json <-> the model section of a configuration. Every field is honoured, or refused by name."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_refine.config import ConfigError, ModelConfig
from megatron_refine.models import family
from megatron_refine.models.hf import ABSENT, REQUIRED, WIDTH, Format, mlp_width

CONFIG = "config.json"
POSITIONS = "max_position_embeddings"
ALWAYS = ("model_type", "architectures")


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder. Raises ConfigError."""
    path = folder / CONFIG
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; name a folder with {CONFIG} and safetensors files")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold an object")
    return tree


def model_of(config: dict[str, Any], where: str) -> ModelConfig:
    """The model that a config.json describes. Raises ConfigError, one line a problem, each naming the field."""
    name, described = _family(config, where)
    config = described.read(config)
    problems = [*_unknown(config, described), *_differing(config, described)]
    section: dict[str, Any] = {"family": name, "intermediate_size": _width(config, problems)}
    for field, key in described.fields.items():
        value = config.get(field, key.default)
        section[key.ours] = key.null if value is None else value
        if value is REQUIRED:
            problems.append(f"{field}: missing; it says the model's {key.ours}")
    if problems:
        raise ConfigError("\n".join(f"{where}: {problem}" for problem in problems))
    theirs = {key.ours: field for field, key in described.fields.items()}
    try:
        return family.FAMILIES[name].model_validate(section)
    except ValidationError as error:
        lines = [(theirs.get(str(e["loc"][0]), e["loc"][0]), e) for e in error.errors()]
        raise ConfigError("\n".join(f"{where}: {field}={e['input']!r}: {e['msg']}" for field, e in lines)) from None


def fresh_config(model: ModelConfig, dtype: str, positions: int = 0) -> dict[str, Any]:
    """Return a complete config.json of a model that came from none.

    dtype: as torch_dtype, e.g. bfloat16. positions: tokens that a server must take, where that is more than usual.
    """
    described = family.of(model.family).format
    tree: dict[str, Any] = {"architectures": [described.architecture], "model_type": described.model_type}
    values = {field: (getattr(model, key.ours), key.null) for field, key in described.fields.items()}
    tree |= {field: None if value == null else value for field, (value, null) in values.items()}
    tree["intermediate_size"] = model.intermediate_size
    tree |= {name: allowed[0] for name, allowed in described.constants.items() if name not in described.not_written}
    tree |= {field: value for field, value in described.ignored.items() if value is not ABSENT}
    if POSITIONS in tree:
        tree[POSITIONS] = max(positions, tree[POSITIONS])
    return described.write(tree) | {"torch_dtype": dtype}


def _family(config: dict[str, Any], where: str) -> tuple[str, Format]:
    found = config.get("model_type")
    if match := family.by_model_type(found):
        return match.name, match.format
    known = ", ".join(sorted(f"{each.format.model_type} ({each.name})" for each in family.every()))
    raise ConfigError(f"{where}: model_type={found!r}: no such family; there are {known}{family.hint(found)}")


def _unknown(config: dict[str, Any], described: Format) -> list[str]:
    known = {*ALWAYS, *WIDTH, *described.fields, *described.constants, *described.ignored}
    return [
        f"{field}={config[field]!r}: unknown field, which may change the model; remove it if it does not"
        for field in config.keys() - known
    ]


def _differing(config: dict[str, Any], described: Format) -> list[str]:
    wrong = [
        (field, values)
        for field, values in described.constants.items()
        if not any(_same(config.get(field, values[0]), value) for value in values)
    ]
    return [
        f"{field}={config[field]!r}: not available; this {described.model_type} computes "
        f"{field}={' or '.join(repr(v) for v in values)} only"
        for field, values in wrong
    ]


def _same(found: Any, expected: Any) -> bool:
    return type(found) is type(expected) and found == expected  # 1 is no true


def _width(config: dict[str, Any], problems: list[str]) -> Any:
    width, ratio = config.get("intermediate_size"), config.get("hidden_ratio", 4)
    if width is not None:
        return width
    hidden = config.get("hidden_size")
    if isinstance(ratio, int | float) and isinstance(hidden, int) and ratio > 0:
        return mlp_width(hidden, ratio)
    problems.append(f"intermediate_size=None: needs a hidden_ratio above zero, which is {ratio!r}")
    return 1
