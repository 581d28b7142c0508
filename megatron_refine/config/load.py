"""Files and overrides -> a checked configuration."""

import difflib
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from megatron_refine.config.checks import cross_check
from megatron_refine.config.schema import Config, ConfigError, ModelConfig, with_model

S = TypeVar("S", bound=BaseModel)
MODELS = Path(__file__).parents[2] / "configs" / "models"


def load(paths: str | Path | list[str], overrides: list[str], families: dict[str, type[ModelConfig]]) -> Config:
    """Read a file, or several of which later ones win, apply `key.sub=value` overrides, validate.

    `model=NAME` takes the model of configs/models/NAME.yaml, `model=FILE` that of a YAML file. `families` maps
    model.family to its schema. Raises ConfigError with one line a problem.
    """
    files = paths if isinstance(paths, list) else [str(paths)]
    files = files + [_preset(o.removeprefix("model=")) for o in overrides if o.startswith("model=")]
    path, tree = " + ".join(files), _overlay([_read(Path(file)) for file in files])
    for override in (o for o in overrides if not o.startswith("model=")):
        _override(tree, override)
    model = tree.get("model")
    if not isinstance(model, dict) or "family" not in model:
        raise ConfigError(f"{path}: model.family: missing; choose one of {', '.join(sorted(families))}")
    schema = families.get(str(model["family"]))
    if schema is None:
        raise ConfigError(
            f"{path}: model.family={model['family']}: unknown; choose one of {', '.join(sorted(families))}"
        )
    full = with_model(schema)
    try:
        config = full.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e, path, full) for e in error.errors())) from None
    return cross_check(config)


def read_as(path: Path, schema: type[S]) -> S:
    """A YAML file with a schema of its own. Raises ConfigError with one line a problem."""
    try:
        return schema.model_validate(_read(path))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e, str(path), schema) for e in error.errors())) from None


def read_yaml(path: Path) -> Any:
    """Whatever a YAML file holds. Raises ConfigError."""
    try:
        return yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


def _overlay(trees: list[dict[str, Any]]) -> dict[str, Any]:
    """Sections merged key by key; a model section that names its family is a whole model and replaces the other."""
    merged: dict[str, Any] = {}
    for tree in trees:
        for name, section in tree.items():
            old = merged.get(name)
            partial = isinstance(section, dict) and isinstance(old, dict) and "family" not in section
            merged[name] = old | section if partial and old else section
    return merged


class _Loader(yaml.SafeLoader):
    """YAML with floats as in YAML 1.2 (`1e-3` is a number), where a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _read(path: Path) -> dict[str, Any]:
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold sections (model:, data:, ...)" + (", is empty" if tree is None else ""))
    return {key: value for key, value in tree.items() if value is not None}  # `train:` alone means the defaults


def _preset(name: str) -> str:
    """The file of a model's name. Raises ConfigError where there is none."""
    if name.endswith(".yaml"):
        return name
    if not (MODELS / f"{name}.yaml").exists():
        known = sorted(path.stem for path in MODELS.glob("*.yaml"))
        raise ConfigError(f"model={name}: unknown; choose one of {', '.join(known)}, or name a YAML file")
    return str(MODELS / f"{name}.yaml")


def _override(tree: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[a-z_0-9]+(\.[a-z_0-9]+)+", key):
        raise ConfigError(f"{text}: an override reads section.key=value")
    *path, last = key.split(".")
    for name in path:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{key}: {name} is a value, not a section")
    try:
        tree[last] = yaml.load(value, _Loader)
    except yaml.YAMLError:
        tree[last] = value


def _explain(error: Any, path: str, schema: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
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
