"""Words of the command line and of YAML files mean what they look like.

What a word is depends on its key: for a key that takes text the word itself, `on`, `007` and `2024-01-01` too. A number
is one in decimal digits. What YAML 1.1 reads as a number in another way than people do (`010` is 8, `1:30` is 90) is
refused.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel

from megatron_refine.config.base import ConfigError
from megatron_refine.config.paths import expand

INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,30})")
DECIMAL = re.compile(r"[-+]?(?=[0-9.]+[.eE]|\.)([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
LARGEST, LARGEST_FLOAT = 2**63 - 1, 3.4e38  # of 64 bits; of fp32
QUOTED = re.compile(r"""'([^']|'')*'|"([^"\\]|\\.)*\"""")
ITEM = re.compile(rf"\s*({QUOTED.pattern}|[^,]*?)\s*(?:,|\Z)")
BARE = re.compile(r"""(?!['"])[^,\[\]{}\n]*[^,\[\]{}\s]""")  # an item of a list that needs no quotes


class Word(str):
    """An unquoted scalar of a YAML file, not yet read as a type."""


class Said(str):
    """The value of an override, not yet read as a type."""


class _Loader(yaml.SafeLoader):
    """YAML whose scalars are Words, and where a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key} stands twice", node.start_mark)
        return {str(key): value for key, value in super().construct_mapping(node, deep).items()}


def _word(loader: _Loader, node: yaml.ScalarNode) -> str:
    return Word(node.value) if node.style is None else str(node.value)


for _tag in ("bool", "int", "float", "timestamp", "value", "str"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _word)


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file, its unquoted scalars as Words. Raises ConfigError."""
    try:
        return yaml.load(Path(expand(str(path))).read_text(encoding="utf-8-sig"), _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not valid YAML: it is nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def settle(value: Any, kind: Any, key: str, problems: list[str]) -> Any:
    """Read the Words in `value` as the type `kind` of the schema. One that cannot be read adds a line to `problems`."""
    kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    form, of = get_origin(kind) or kind, get_args(kind)
    if kind is Any or value is None:
        return value
    if isinstance(form, type) and issubclass(form, BaseModel) and isinstance(value, dict):
        fields = form.model_fields
        return {
            name: settle(v, fields[name].annotation if name in fields else Any, f"{key}.{name}".lstrip("."), problems)
            for name, v in value.items()
        }
    if form in (list, dict) and isinstance(value, Said):
        value = _collection(value, form, key, problems)
    if form is list and isinstance(value, list):
        return [settle(item, of[0], f"{key}.{i}", problems) for i, item in enumerate(value)]
    if form is dict and isinstance(value, dict):
        return {name: settle(item, of[1], f"{key}.{name}", problems) for name, item in value.items()}
    if form in (str, Literal):
        return _unquoted(value) if isinstance(value, Said) else str(value) if isinstance(value, Word) else value
    return plain(value, key, problems) if form in (int, float, bool) and isinstance(value, Word | Said) else value


def settle_points(points: Sequence[dict[str, Any]], schema: type[BaseModel], path: str | Path) -> list[dict[str, Any]]:
    """Read the Words in points of a sweep, {key of the schema: value}. Raises ConfigError."""
    problems: list[str] = []
    settled = [
        {key: settle(value, _kind(schema, key), key, problems) for key, value in point.items()} for point in points
    ]
    if problems:
        raise ConfigError("\n".join(f"{path}: {problem}" for problem in dict.fromkeys(problems)))
    return settled


def _kind(schema: Any, key: str) -> Any:
    """Return the type of a key. Without such a key: float, for which text stays text too."""
    for name in key.split("."):
        fields = schema.model_fields if isinstance(schema, type) and issubclass(schema, BaseModel) else {}
        if name not in fields:
            return float
        schema = fields[name].annotation
    return schema


def plain(word: str, key: str, problems: list[str]) -> Any:
    """Return a number, a boolean or None where the word is one to people and to YAML, else its text."""
    text = word.strip()
    if INTEGER.fullmatch(text) or DECIMAL.fullmatch(text):
        number: int | float = int(text) if INTEGER.fullmatch(text) else float(text)
        if math.isfinite(number) and abs(number) > (LARGEST if isinstance(number, int) else LARGEST_FLOAT):
            problems.append(f"{key}={text}: is larger than a computer's number can be; write a smaller one")
        return number
    loader = yaml.SafeLoader("")
    try:
        read = loader.construct_object(yaml.ScalarNode(loader.resolve(yaml.ScalarNode, text, (True, False)), text))
    except (yaml.YAMLError, ValueError):
        return str(word)
    if isinstance(read, int | float) and not isinstance(read, bool) and math.isfinite(read):
        problems.append(f"{key}={text}: YAML reads this as {read}; write the number in plain decimal digits")
    return read if isinstance(read, int | float | bool | None) else str(word)


def _collection(text: Said, form: type, key: str, problems: list[str]) -> Any:
    """Return the list or the mapping that an override writes on one line, or its text where it is none."""
    inner = text.strip()
    if form is dict:
        try:
            found = yaml.load(inner, _Loader)
        except (yaml.YAMLError, RecursionError):
            return str(text)
        return found if isinstance(found, dict) else str(text)
    if not (inner.startswith("[") and inner.endswith("]")):
        return str(text)
    items, inner, at = list[str](), inner[1:-1], 0
    while inner[at:].strip():
        found = ITEM.match(inner, at)
        if not found or not (QUOTED.fullmatch(found[1]) or BARE.fullmatch(found[1])):
            problems.append(f"{key}={text}: cannot be read from {inner[at:].strip()!r} on; put the item into quotes")
            return []
        items.append(_unquoted(found[1]) if QUOTED.fullmatch(found[1]) else Word(found[1]))
        at = found.end()
    return items


def _unquoted(text: str) -> str:
    """Return the text without the quotes that stand around all of it."""
    if not QUOTED.fullmatch(text):
        return str(text)
    if text[0] == "'":
        return text[1:-1].replace("''", "'")
    try:
        return str(yaml.load(text, _Loader))
    except yaml.YAMLError:
        return str(text)


def spell(value: Any) -> str:
    """Write a value as an override does: `settle` reads it back."""
    if isinstance(value, list):
        return f"[{', '.join(map(_item, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    text = "" if value is None else str(value)
    return _quoted(text) if QUOTED.fullmatch(text) else text


def _item(value: Any) -> str:
    text = spell(value)
    return text if BARE.fullmatch(text) and text[0].strip() or QUOTED.fullmatch(text) else _quoted(text)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
