"""Paths in the configuration: what is expanded in them, and which keys hold them.

A key holds a path where the schema says PathText, or one of what is made of it below; nothing else lists them.
"""

import argparse
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel

VARIABLE = re.compile(r"\$(?:\{([^}]*)\}|([A-Za-z_][A-Za-z0-9_]*))")


def expand(text: str) -> str:
    """Replace `~`, `~user`, `$VAR` and `${VAR}` in a path.

    Raises ValueError for a variable that is not set, an unknown user, and a character that no path can hold.
    """
    path = os.path.expanduser(VARIABLE.sub(_value, text))
    if path.startswith("~"):
        raise ValueError(f"no user has the name {path[1:].split('/')[0]!r}; write ./{path} for a folder of that name")
    if VARIABLE.search(path):  # another process, which reads the result, would replace it
        raise ValueError(f"a variable in it holds a variable again: {path}; write the path itself")
    if "\0" in path:
        raise ValueError("a path cannot hold a NUL character; remove it")
    return path


def _value(found: re.Match[str]) -> str:
    name = found[1] if found[2] is None else found[2]
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(f"{found[0]}: only $VAR and ${{VAR}} are replaced; write the path itself")
    if not os.environ.get(name):
        raise ValueError(f"the variable {name} is not set; export it, or write the path itself")
    return os.environ[name]


def is_utf8(word: str) -> bool:
    """Tell whether a word of the command line was text: Python keeps other bytes as surrogates."""
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


def _written(path: str) -> str:
    """Refuse what files in UTF-8 cannot name, as configurations and reports do."""
    if not is_utf8(path):
        raise ValueError("is not UTF-8; give the file or the folder another name")
    return path


def _filled(path: str) -> str:
    if not path:
        raise ValueError("is empty; name a path")
    return path


_PATH, _PROGRAM = object(), object()
_PathOfData = Annotated[str, AfterValidator(expand), _PATH]  # files that are there may have any name
PathText = Annotated[_PathOfData, AfterValidator(_written)]
ProgramText = Annotated[str, AfterValidator(expand), _PROGRAM]  # a name alone is one that PATH finds


def is_path(marks: Sequence[Any]) -> bool:
    """Tell by the marks of its type whether a key holds a path."""
    return _PATH in marks or _PROGRAM in marks


RequiredPath = Annotated[PathText, AfterValidator(_filled)]
FilePaths = list[Annotated[_PathOfData, AfterValidator(_filled)]]


def resolved(config: BaseModel, tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str | list[str]]]:
    """Yield each key whose path depends on the working directory or the environment, with the path made absolute.

    tree: what files and overrides say, before paths are expanded.
    """
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from resolved(value, tree.get(name) or {}, f"{prefix}{name}.")
            continue
        marks = [
            *field.metadata,
            *(m for item in get_args(field.annotation) for m in getattr(item, "__metadata__", ())),
        ]
        if not is_path(marks):
            continue
        absolute: Any = [_absolute(path) for path in value] if isinstance(value, list) else _absolute(value)
        found = _PROGRAM in marks and "/" not in value  # by PATH
        if (absolute != value and not found) or re.search("[$~]", str(tree.get(name))):
            yield f"{prefix}{name}", value if found else absolute


def _absolute(path: str) -> str:
    return path if not path or os.path.isabs(path) else str(Path(path).absolute())


def text_argument(text: str) -> str:
    """Expand a path of the command line where the shell did not. A type for argparse."""
    try:
        return expand(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def path_argument(text: str) -> Path:
    """Return `text_argument` as a Path."""
    return Path(text_argument(text))
