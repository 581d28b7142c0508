"""Files and overrides -> a checked configuration."""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from megatron_refine.config.base import ConfigError
from megatron_refine.config.checks import cross_check
from megatron_refine.config.paths import expand, resolved
from megatron_refine.config.schema import Config, ModelConfig, with_model
from megatron_refine.config.words import Said, read_yaml, settle, spell

S = TypeVar("S", bound=BaseModel)


def load(paths: str | Path | list[str], overrides: list[str], families: Mapping[str, type[ModelConfig]]) -> Config:
    """Read a file, or several of which later ones win, apply `key.sub=value` overrides, validate.

    `model=NAME` takes the model of configs/models/NAME.yaml, `model=FILE` that of a YAML file. `families` maps
    model.family to its schema. Raises ConfigError with one line a problem.
    """
    path, tree = _merged(paths if isinstance(paths, list) else [str(paths)], overrides)
    model = tree.get("model")
    if not isinstance(model, dict) or "family" not in model:
        raise ConfigError(f"{path}: model.family: missing; choose one of {', '.join(sorted(families))}")
    schema = families.get(str(model["family"]))
    if schema is None:
        raise ConfigError(
            f"{path}: model.family={model['family']}: unknown; choose one of {', '.join(sorted(families))}"
        )
    return cross_check(_validated(tree, with_model(schema), path))


def _merged(files: Sequence[str], overrides: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return the files' name in messages, and the tree of all that they and the overrides say."""
    models = [preset(o.removeprefix("model=")) for o in overrides if o.startswith("model=")]
    tree = _overlay([*(_read(file) for file in files), *(_model(file) for file in models)])
    for override in (o for o in overrides if not o.startswith("model=")):
        _override(tree, override)
    return " + ".join([*files, *models]) or "the command line", tree


def read_as(path: Path, schema: type[S]) -> S:
    """Read a YAML file that has a schema of its own. Raises ConfigError with one line a problem."""
    return _validated(_read(str(path)), schema, str(path))


def _validated(tree: dict[str, Any], schema: type[S], path: str) -> S:
    problems: list[str] = []
    try:
        tree = settle(tree, schema, "", problems)
        found = schema.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join([*(f"{path}: {p}" for p in problems),
                                     *(_explain(e, path, schema) for e in error.errors())])) from None  # fmt: skip
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply, or an alias stands within itself; flatten it") from None
    if problems:
        raise ConfigError("\n".join(f"{path}: {problem}" for problem in problems))
    return found


def _overlay(trees: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge sections key by key; a model section that names its family is a whole model and replaces the other."""
    merged: dict[str, Any] = {}
    for tree in trees:
        for name, section in tree.items():
            old = merged.get(name)
            partial = isinstance(section, dict) and isinstance(old, dict) and "family" not in section
            merged[name] = old | section if partial and old else section
    return merged


def _read(path: str) -> dict[str, Any]:
    tree = read_yaml(shipped(path))
    if not isinstance(tree, dict):
        empty = "; it is empty" if tree is None else ""
        raise ConfigError(f"{path}: must hold sections (model:, data:, ...){empty}")
    return {key: value for key, value in tree.items() if value is not None}  # `train:` alone means the defaults


def _model(path: str) -> dict[str, Any]:
    """Read the model's section of a file, and nothing else that stands there."""
    tree = _read(path)
    if "model" not in tree:
        raise ConfigError(f"model={path}: has no section model; name the file with --config for its other sections")
    return {"model": tree["model"]}


def shipped(path: str) -> str:
    """Return the file, or where there is none, the package's own: `configs/quickstart.yaml` works in any folder."""
    own = Path(str(resources.files("megatron_refine"))) / path
    return str(own) if path.startswith("configs/") and not os.path.exists(path) and own.is_file() else path


def preset(name: str) -> str:
    """Return the file of a preset, or `name` if it names a file. Raises ConfigError where it is neither."""
    models = Path(str(resources.files("megatron_refine"))) / "configs/models"
    if (models / f"{name}.yaml").is_file() and "/" not in name:
        return str(models / f"{name}.yaml")
    if name.endswith((".yaml", ".yml")) or "/" in name or os.path.isfile(name):
        return name
    known = sorted(path.stem for path in models.glob("*.yaml"))
    if not known:
        raise ConfigError(f"model={name}: the presets are not installed: no files in {models}; name a YAML file")
    raise ConfigError(f"model={name}: unknown; choose one of {', '.join(known)}, or name a YAML file")


def files_and_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell the files of a command line from its overrides: a file may have = in its name, or in that of its folder."""
    files = [w for w in words if "=" not in w or "/" in w.partition("=")[0] or os.path.isfile(w)]
    return files, [word for word in words if word not in files]


def absolute(
    files: Sequence[str],
    overrides: Sequence[str],
    families: Mapping[str, type[ModelConfig]],
    before: Sequence[str] = (),
) -> list[str]:
    """Return overrides that give the same configuration in any working directory and environment.

    before: overrides that stand before them, and stay. Every path that is relative or holds a variable is written out,
    whether overrides, files or defaults say it. Raises ConfigError.
    """
    config, tree = load([*files], [*before, *overrides], families), _merged(files, [*before, *overrides])[1]
    paths = dict(resolved(config, tree))
    kept = [o for o in overrides if o.partition("=")[0] not in paths]
    for i, (key, _, value) in enumerate(o.partition("=") for o in kept):
        if key == "model" and preset(value) == value:
            kept[i] = f"model={absolute_file(value)}"
    return [*kept, *(f"{key}={spell(value)}" for key, value in paths.items())]


def absolute_file(path: str) -> str:
    """Expand a file's name on the command line and make it absolute. Raises ConfigError."""
    try:
        return str(Path(expand(shipped(path))).absolute())
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def _override(tree: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[a-z_0-9]+(\.[a-z_0-9]+)+", key):
        hint = "; name a file with --config" if os.path.isfile(text) else ""
        raise ConfigError(f"{text}: an override reads section.key=value{hint}")
    *path, last = key.split(".")
    for name in path:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{key}: {name} is a value, not a section; write section.key=value")
    tree[last] = Said(value)


def _explain(error: Any, path: str, schema: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        if len(error["loc"]) == 1 and key in _keys(schema):
            section, _, name = key.partition(".")
            return f"{path}: {key}: in a file a key stands in its section; write {section}: {{{name}: ...}}"
        names = [*schema.model_fields, *_keys(schema)]
        same = [name for name in names if name.split(".")[-1] == key.split(".")[-1]]
        close = same or difflib.get_close_matches(key, names, 1)
        return f"{path}: {key}: unknown key" + (f"; did you mean {close[0]}?" if close else "")
    if error["type"] == "missing":
        return f"{path}: {key}: missing; set it in the file or with {key}=..."
    message = error["msg"].removeprefix("Value error, ")
    hint = f"; write {key}=[{error['input']}]" if error["type"] == "list_type" else ""
    return f"{path}: {key}={error['input']!r}: {message[0].lower()}{message[1:]}{hint}"


def _keys(schema: type[BaseModel], prefix: str = "") -> list[str]:
    names: list[str] = []
    for name, field in schema.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            names += _keys(inner, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names
