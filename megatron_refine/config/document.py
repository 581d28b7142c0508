"""Write docs/configuration.md: docs/configuration.md.in, and a table of keys for each section and family.

    python -m megatron_refine.config.document [--check]

What a key means stands in its description, what a section is for in its docstring. Both are Markdown; docs/NAME.md in
them becomes a link. Nothing here imports torch.
"""

import argparse
import inspect
import pkgutil
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_refine.config.base import Section
from megatron_refine.config.paths import is_path
from megatron_refine.config.schema import Config, ModelConfig
from megatron_refine.config.words import spell

PAGE = Path(__file__).parents[2] / "docs/configuration.md"
TEMPLATE = PAGE.with_suffix(".md.in")
HERE = "{sections}"  # the line of the template where sections and keys are put
NOTE = "<!-- Written by `make configuration`: edit configuration.md.in and the schema instead. -->\n\n"
_HEAD = "| key | type | default | meaning |\n|---|---|---|---|\n"
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def render(template: str, families: Mapping[str, type[ModelConfig]]) -> str:
    """Return the page. `families` maps model.family to its schema."""
    parts: list[str] = []
    for name, field in Config.model_fields.items():
        parts.append(f"## {name}\n\n{_section(name, field.annotation)}")
        if name == "model":
            parts += [f"### {family}\n\n{_section(name, schema)}" for family, schema in families.items()]
    return NOTE + template.replace(HERE, "\n\n".join(parts))


def explain(key: str, schema: type[BaseModel] = Config) -> str:
    """Return a key's type, default and meaning on one line.

    schema: `with_model(...)` for the keys of a family. Raises KeyError for an unknown key.
    """
    kind: Any = schema
    for name in key.split("."):
        field = getattr(kind, "model_fields", {})[name]
        kind = field.annotation
    default = _default(field)
    stated = "required" if default is None else f"default {default}"
    return f"{key}: {_type(field.annotation, field.metadata)}, {stated}. {field.description}".replace("`", "")


def _section(prefix: str, schema: Any) -> str:
    """The text of a section, and a row for each key that it, or a base without a text of its own here, adds."""
    bases = takewhile(lambda base: base not in (ModelConfig, Section), schema.__mro__[1:])
    own = {name for each in (schema, *bases) for name in inspect.get_annotations(each)}
    rows = [_row(f"{prefix}.{name}", field) for name, field in schema.model_fields.items() if name in own]
    return f"{_linked(inspect.cleandoc(schema.__doc__ or ''))}\n\n{_HEAD}" + "\n".join(rows)


def _row(key: str, field: FieldInfo) -> str:
    default, meaning = _default(field), _linked(field.description or "").replace("|", r"\|")
    shown = "required" if default is None else f"`{default}`"
    return f"| `{key}` | {_type(field.annotation, field.metadata)} | {shown} | {meaning} |"


def _linked(text: str) -> str:
    return re.sub(r"\bdocs/([\w-]+\.md)\b", r"[\1](\1)", text)


def _type(kind: Any, marks: Sequence[Any]) -> str:
    """A type in words, with the bounds among its marks: `int >= 1`, a choice of texts, `list of path`."""
    if get_origin(kind) is Annotated:
        kind, *marks = get_args(kind)
    form, of = get_origin(kind) or kind, get_args(kind)
    if is_path(marks):
        return "path"
    if form is Literal:
        return ", ".join(f"`{choice}`" for choice in of)
    if form in (list, dict):
        return f"{'list' if form is list else 'map'} of {_type(of[-1], ())}"
    pairs = [(sign, getattr(mark, name, None)) for mark in marks for name, sign in _BOUNDS.items()]
    bounds = ", ".join(f"{sign} {bound}" for sign, bound in pairs if bound is not None)
    return f"{form.__name__} {bounds}".strip()


def _default(field: FieldInfo) -> str | None:
    """The default as one writes it in YAML; None where the key is required."""
    if field.is_required():
        return None
    value = field.get_default(call_default_factory=True)
    if isinstance(value, float):
        return re.sub(r"e\+?(-?)0*", r"e\1", f"{value:g}")
    return spell(value) or '""'


def main(arguments: list[str] | None = None) -> None:
    """Write the page, or with --check end with code 1 where it is out of date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; end with code 1 if it would change")
    check = parser.parse_args(arguments).check
    families = pkgutil.resolve_name("megatron_refine.models.family:FAMILIES")  # by name: nothing here knows a family
    page = render(TEMPLATE.read_text(encoding="utf-8"), families)
    if not check:
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
        sys.exit(f"{PAGE}: is out of date; run make configuration")


if __name__ == "__main__":
    main()
