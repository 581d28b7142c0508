"""Examples from tables: a prompt, the answers that count as right, and how many tokens may be written."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from megatron_refine.config import ConfigError
from megatron_refine.data.corpus import find_corpus
from megatron_refine.data.formats import named, refusal, shown
from megatron_refine.data.readers import flaw, read_rows

_ENDING = re.compile(r"(_\d+|_train|_test|_valid(ation)?)+$")  # lengths, counts and split at the end of a file's name


@dataclass(frozen=True)
class Example:
    """A question to a model. The text is that of the file or the generator, character by character."""

    task: str
    index: int  # its place among those read or generated together, from 0
    prompt: str
    references: tuple[str, ...]  # at least one, none of them empty
    max_new_tokens: int


@dataclass(frozen=True)
class Columns:
    """Names of columns. Empty: the first of the usual names that the row has."""

    prompt: str = ""
    answers: str = ""  # a list of texts, or one text
    task: str = ""  # optional
    max_new_tokens: str = ""  # optional


_USUAL = {
    "prompt": ("prompt",),
    "answers": ("answers", "answer"),
    "task": ("task",),
    "max_new_tokens": ("max_gen_tokens",),
}


def read_examples(
    paths: list[str], columns: Columns, key: str, *, task: str = "", max_new_tokens: int = 128,
    say: Callable[[str], None] = lambda _: None,
) -> list[Example]:  # fmt: skip
    """Read all rows of the tables at `paths` (files or folders), in order. `say` is told what was read.

    task, max_new_tokens: where a row does not say (it has no such column, or null in one of a usual name). An empty
    `task` then is the file's name without lengths: qasper_16384.parquet holds "qasper".

    Texts stay what they are: NUL, CRLF, U+2028 and emoji included; "|" separates nothing. Half a surrogate pair, which
    jsonl can write and no tokenizer reads, is an error. So is any other bad cell: a ConfigError of one line that names
    `key`, the file, the row (from 1) and the remedy.
    """
    if not paths:
        raise ConfigError(f"{key}: names no files; name .jsonl or .parquet files, or folders of them")
    found: list[Example] = []
    corpus = find_corpus(paths, "", key)
    say(corpus.summary)
    for (_, path), form in zip(corpus.files, corpus.forms, strict=True):
        before, stem = len(found), shown(named(path)[0])
        for number, row in enumerate(read_rows(path, key, form), 1):
            cells = _Cells(row, f"{key}: {shown(path)}: row {number}", columns)
            name = cells.task() or task or _ENDING.sub("", stem) or stem
            limit = cells.max_new_tokens() or max_new_tokens
            found.append(Example(name, len(found), cells.prompt(), cells.references(), limit))
        if len(found) == before:
            raise refusal(path, key, "holds no rows; fill it or leave it out")
    return found


@dataclass(frozen=True)
class _Cells:
    """One row, whose cells are checked as they are asked for."""

    row: dict[str, Any]
    where: str
    columns: Columns

    def prompt(self) -> str:
        return self._text(*self._cell("prompt"))

    def references(self) -> tuple[str, ...]:
        name, value = self._cell("answers")
        if value == []:
            self._refuse(name, "an empty list, no answer")
        return tuple(self._text(name, answer) for answer in (value if isinstance(value, list) else [value]))

    def task(self) -> str:
        """Return the name of the task; empty where the row does not say."""
        return self._text(*self._cell("task")) if self._says("task") else ""

    def max_new_tokens(self) -> int:
        """Return the limit of the answer; 0 where the row does not say."""
        if not self._says("max_new_tokens"):
            return 0
        name, value = self._cell("max_new_tokens")
        if type(value) is not int or value < 1:
            self._refuse(name, f"{value!r:.40}, not a whole number of 1 or more")
        return value

    def _says(self, what: str) -> bool:
        """Tell whether to read an optional cell: a column that was named must be there, a usual one may be null."""
        return bool(getattr(self.columns, what)) or self.row.get(_USUAL[what][0]) is not None

    def _cell(self, what: str) -> tuple[str, Any]:
        """Return name and value of the column. Raises ConfigError where the row has none."""
        named = getattr(self.columns, what)
        names = (named,) if named else _USUAL[what]
        for name in names:
            if name in self.row:
                return name, self.row[name]
        wanted, present = " or ".join(names), ", ".join(map(str, self.row))
        raise ConfigError(f"{self.where}: has no column {wanted}; it has {present or 'none'}: name one of these")

    def _text(self, name: str, value: Any) -> str:
        if problem := flaw(value) or ("" if value else "an empty text"):
            self._refuse(name, problem)
        return value

    def _refuse(self, name: str, held: str) -> NoReturn:
        raise ConfigError(f"{self.where}: column {name} holds {held}; fix the row or name another column")
