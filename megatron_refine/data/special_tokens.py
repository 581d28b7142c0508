"""Special tokens, which begin a text, end an answer or pad: those that the files beside a tokenizer declare.

Asked in this order: the token named in tokenizer_config.json, then in special_tokens_map.json; the id in
generation_config.json, then in config.json; the tokenizer itself (a sentencepiece model knows its own; in a
tokenizer.json the usual names are looked up). A name that is null forbids that last guess.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megatron_refine.config import ConfigError
from megatron_refine.data.formats import reading, refusal, shown
from megatron_refine.files import TornError, read_json

KEPT = "special_tokens.json"  # what was found, kept beside a copy of the tokenizer; it is asked before all others
_NAMES, _NUMBERS = ("tokenizer_config.json", "special_tokens_map.json"), ("generation_config.json", "config.json")
OWN = "the tokenizer itself"
_ROLES = ("bos", "eos", "pad")


class Vocabulary(Protocol):
    """The part of a tokenizer that is asked for its special tokens."""

    largest_id: int
    bos_id: int | None  # by the tokenizer's file alone, as the other two
    eos_id: int | None
    pad_id: int | None

    def token_id(self, token: str) -> int | None:
        """Return the id of a token by its name, None where there is none."""


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the special tokens, None where there is no such token."""

    bos: int | None
    eos: int | None  # what training appends to an answer
    pad: int | None
    ends: tuple[int, ...]  # each of them ends an answer, eos among them
    origin: dict[str, str]  # the file that declares each, or OWN
    names: dict[str, str] = field(default_factory=dict)  # by role, of those that the tokenizer's own file lacks

    def __str__(self) -> str:
        found = [f"{role.upper()} {self._one(role)}" for role in _ROLES]
        also = [str(end) for end in self.ends if end != self.eos]
        return ", ".join(found) + (f"; {', '.join(also)} end answers too" if also else "")

    def _one(self, role: str) -> str:
        value, origin = getattr(self, role), self.origin[role]
        return ("none" if value is None else str(value)) + (f" ({origin})" if origin != OWN else "")

    def to_json(self) -> dict[str, Any]:
        """Return the content of KEPT."""
        return asdict(self)


def find_special_tokens(path: Path, vocabulary: Vocabulary, key: str) -> SpecialTokens:
    """Find the special tokens of the tokenizer in the file `path`.

    Raises ConfigError where a declared one does not exist and where a file that declares them is damaged.
    """
    files = {name: _read(path.with_name(name), key) for name in (KEPT, *_NAMES, *_NUMBERS)}
    if kept := files.pop(KEPT):
        try:
            return SpecialTokens(**kept | {"ends": tuple(kept["ends"])})
        except (TypeError, KeyError):
            raise refusal(path.with_name(KEPT), key, "is not what a run keeps of its tokenizer; delete it") from None
    found: dict[str, int | None] = {}
    origin: dict[str, str] = {}
    for role in _ROLES:
        found[role], origin[role] = _find(role, files, path, vocabulary, key)
    numbers = [i for name in _NUMBERS for i in _numbers("eos", name, files[name], path, vocabulary, key)]
    eos = [] if found["eos"] is None else [found["eos"]]
    added = [role for role, number in found.items() if number is not None and number > vocabulary.largest_id]
    names = {role: _name(role, files[origin[role]]) for role in added}
    return SpecialTokens(**found, ends=tuple(dict.fromkeys(eos + numbers)), origin=origin, names=names)


def _find(
    role: str, files: dict[str, dict[str, Any]], path: Path, vocabulary: Vocabulary, key: str
) -> tuple[int | None, str]:
    """Return the id of a role, None where there is none, and the file that says so."""
    absent = ""
    for name in _NAMES:
        token = _name(role, files[name])
        if token is None or token == "":
            absent = absent or (name if f"{role}_token" in files[name] else "")
            continue
        found = _named(token, files[name], vocabulary) if isinstance(token, str) else None
        if found is None and role != "pad":  # nothing is padded with it: a published one may lack it
            what = f"declares {role}_token {shown(repr(token))}, which {shown(path.name)} does not have; correct it"
            raise refusal(path.with_name(name), key, what)
        if found is not None:
            return found, name
    for name in _NUMBERS:
        if ids := _numbers(role, name, files[name], path, vocabulary, key):
            return ids[0], name
    return (None, absent) if absent else (getattr(vocabulary, f"{role}_id"), OWN)


def _name(role: str, tree: dict[str, Any]) -> Any:
    """Return the token that a file of names declares for a role."""
    token = tree.get(f"{role}_token")
    return token.get("content") if isinstance(token, dict) else token


def _named(token: str, tree: dict[str, Any], vocabulary: Vocabulary) -> int | None:
    """Return the id of a token. One that was added to a sentencepiece model stands in tokenizer_config.json alone."""
    if (found := vocabulary.token_id(token)) is not None:
        return found
    added = tree.get("added_tokens_decoder")
    for number, entry in added.items() if isinstance(added, dict) else ():
        if isinstance(entry, dict) and entry.get("content") == token and str(number).isdecimal():
            return int(number)
    return None


def _numbers(
    role: str, name: str, tree: dict[str, Any], path: Path, vocabulary: Vocabulary, key: str
) -> list[int]:  # fmt: skip
    """Return the ids of a role in generation_config.json or config.json, which hold one, a list of them, or none."""
    entry = f"{role}_token_id"
    inner = tree.get("text_config")  # of a model that reads more than text
    value = tree.get(entry, inner.get(entry) if isinstance(inner, dict) else None)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for i in ids:
        if type(i) is not int or (i > vocabulary.largest_id and role != "pad"):
            what = f"declares {entry} {shown(repr(i))}, but {shown(path.name)} has ids up to {vocabulary.largest_id}"
            raise refusal(path.with_name(name), key, f"{what}; correct it, or move the tokenizer away from it")
    return [i for i in ids if 0 <= i <= vocabulary.largest_id]  # -1: some say none so


def _read(path: Path, key: str) -> dict[str, Any]:
    """Read a JSON object; an empty one where there is no such file. Raises ConfigError."""
    with reading(path, key):
        if not path.is_file():
            return {}
        try:
            tree = read_json(path)
        except TornError as error:
            raise ConfigError(f"{key}: {error}") from None
    if not isinstance(tree, dict):
        raise refusal(path, key, "holds no JSON object; correct it")
    return tree
