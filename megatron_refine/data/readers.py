"""Documents of one file: a text is one document, a row of a table is one. Tables are JSON lines, JSON and parquet."""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from megatron_refine.config import ConfigError
from megatron_refine.data.formats import BOM, Form, form_of, opened, reading, refusal, shown, suffix_in

_PARQUET_ROWS = 64  # rows decoded at once: documents are long, and a file's own row groups may hold thousands
_LOOK = 1 << 16  # bytes of a text that are searched for rows
_CHUNK = 1 << 20  # characters of a JSON file that are read at once
_BLANKS = re.compile(r"[ \t\r\n]*")
_EXCEL = re.compile(r"sep=.\s*")  # a first line that Excel reads
_NULS = "NUL bytes, as a power cut leaves them"


def read_documents(path: Path, column: str, key: str, form: Form | None = None) -> Iterator[str]:
    """Yield the documents of `path` in file order; form: what `form_of` says of it, if that is known.

    Raises ConfigError naming the file, and the row or line where it can.
    """
    form = form or form_of(path, key)
    if form.is_table:
        yield from _read_table(path, column, key, form)
    else:
        yield _read_text(path, column, key, form)


def _read_text(path: Path, column: str, key: str, form: Form) -> str:
    with opened(path, form, key) as file:
        content = file.read()
    if (nul := content.find(b"\0")) >= 0:
        what = f"is not text: byte {nul} is NUL (damaged, binary or UTF-16); restore it or leave it out"
        raise refusal(path, key, what)
    try:
        text = content.removeprefix(BOM).decode()  # not read_text: line ends stay what they are
    except UnicodeDecodeError as error:
        raise refusal(
            path, key, f"is not UTF-8 text (byte {error.start + len(BOM) * form.bom}); convert it, or leave it out "
            "(tables are known by their names, .jsonl and .parquet)"
        ) from None  # fmt: skip
    if found := _rows_in(text, column, suffix_in(path)):
        raise refusal(path, key, f"looks like {found}, not like one document; {_REMEDIES[found]}")
    return text


_REMEDIES = {
    "JSON lines": "name it .jsonl",
    "JSON objects": "name it .json",
    "a JSON array of objects": "name it .json",
    "a table": "convert it to .jsonl or .parquet",
}


def _rows_in(text: str, column: str, suffix: str) -> str:
    """Say what a text is in truth if its rows look like documents; "" if it is one document.

    JSON lines: each of the first lines is an object, and there are two or more, or the only one has the column. So does
    the first of objects that take several lines each.
    """
    if suffix in (".csv", ".tsv", ".tab", ".psv"):
        head = _EXCEL.sub("", text[:_LOOK].lstrip())
        cells = [re.split("[,;|\t]", line) for line in head.splitlines() if line.strip()][:2]
        named = column in [name.strip(' "') for name in cells[0]] if cells else False
        return "a table" if named or (len(cells) > 1 and min(map(len, cells)) > 1) else ""
    first = text[_BLANKS.match(text).end() :][:1] if text[:1] in "{[ \t\r\n" else ""  # type: ignore[union-attr]
    if first == "[":
        value = _loads(text)
        return "a JSON array of objects" if value and all(isinstance(row, dict) for row in value) else ""
    lines = list(_first_lines(text)) if first == "{" else []
    rows = [row for row in map(_loads, lines) if isinstance(row, dict)]
    if len(rows) < len(lines):
        return "JSON objects" if column in _first_object(text) else ""
    return "JSON lines" if len(rows) > 1 or (rows and column in rows[0]) else ""


def _first_object(text: str) -> dict[str, Any]:
    """Return the JSON object that a text begins with; an empty one where there is none."""
    try:
        value = json.JSONDecoder().raw_decode(text, _BLANKS.match(text).end())[0]  # type: ignore[union-attr]
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _first_lines(text: str) -> Iterator[str]:
    """Yield lines that are not blank: those that begin in the first part of a text, and two of it in any case."""
    at = count = 0
    while at < len(text) and (at < _LOOK or count < 2):
        end = text.find("\n", at)
        end = len(text) if end < 0 else end
        if line := text[at:end].strip():
            count += 1
            yield line
        at = end + 1


def _loads(text: str) -> Any:
    """Return the JSON value of a text, or None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_rows(
    path: Path, key: str, form: Form | None = None, column: str | None = None
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Yield the rows of a table in file order: column -> value, whatever its type. With `column` those of parquet have
    that one alone, where there is one.

    Values come as they stand in the file, odd characters too. Raises ConfigError naming the file and, in JSON, the
    line, for a file that is not a table, that is broken or that cannot be read.
    """
    form = form or form_of(path, key)
    if not form.is_table:
        raise refusal(path, key, "is not a table (known by their names: .jsonl and .parquet); convert or rename it")
    if form.kind == "parquet":
        yield from _parquet_rows(path, key, column)
        return
    with opened(path, form, key) as file:
        yield from (_jsonl_rows if form.kind == "jsonl" else _json_rows)(file, path, key)


def flaw(value: object) -> str:
    """Say what a cell holds instead of text that has an encoding; "" where nothing is wrong."""
    if value is None:
        return "nothing (null or missing)"
    if not isinstance(value, str):
        return f"{type(value).__name__}, not text"
    try:
        value.encode()
    except UnicodeEncodeError as error:  # jsonl can escape half a pair, no tokenizer takes it
        return f"half a surrogate pair at character {error.start}, not text"
    return ""


def _read_table(path: Path, column: str, key: str, form: Form) -> Iterator[str]:
    where = f"data.text_column={column}: {shown(path)} ({key})"
    for number, row in enumerate(read_rows(path, key, form, column), 1):
        if column not in row:
            names = ", ".join(map(str, row)) or "none"
            raise ConfigError(f"{where}: row {number} has no such column; it has {names}: name one of these")
        if found := flaw(row[column]):
            raise ConfigError(f"{where}: row {number} holds {found}; fix the row or name another column")
        yield row[column]


class _Doubtful(dict[str, Any]):
    """A JSON object with a key that stands twice: readers differ in which value counts."""

    key = ""


def _noted(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys, found = [key for key, _ in pairs], _Doubtful(found)
        found.key = next(key for key in keys if keys.count(key) > 1)
    return found


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{type(value).__name__}, not an object")
    if isinstance(value, _Doubtful):
        raise ValueError(f"the key {value.key!r} stands twice in an object")
    return value


def _broken(path: Path, key: str, kind: str, reason: str) -> ConfigError:
    return refusal(path, key, f"is a broken {kind} file: {reason}; repair it or leave it out")


def _jsonl_rows(lines: IO[bytes], path: Path, key: str) -> Iterator[dict[str, Any]]:
    """Yield the objects, one a line. (`datasets` would turn text that looks like dates into dates, and drop half
    surrogate pairs.)"""
    for number, line in enumerate(lines, 1):  # bytes: only b"\n" ends a line, U+2028 does not
        if not line.strip():
            continue
        try:
            if b"\0" in line:
                raise ValueError(_NULS)
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            row = _object(json.loads(text, object_pairs_hook=_noted))
        except ValueError as error:
            raise _broken(path, key, "jsonl", f"line {number}: {error}") from None
        except RecursionError:
            raise _broken(path, key, "jsonl", f"line {number}: nested too deeply") from None
        yield row


def _json_rows(file: IO[bytes], path: Path, key: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of an array, one object, or objects one after another."""
    values = _Values(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))
    try:
        array = values.next_char() == "["
        values.at += array
        while (char := values.next_char()) and char != "]":
            yield _object(values.value())
            if array and values.next_char() not in ("", "]"):
                values.take(",")
                if values.next_char() == "]":
                    raise ValueError("a comma before the end of the array")
        if array:
            values.take("]")
        if values.next_char():
            raise ValueError(f"{values.next_char()!r} where the file should end")
    except (ValueError, RecursionError) as error:
        deep = "nested too deeply"
        reason = deep if isinstance(error, RecursionError) else getattr(error, "msg", None) or str(error)
        raise _broken(path, key, "json", f"line {values.line}: {reason}") from None


class _Values:
    """JSON values in a stream, decoded one by one: one of them and a chunk are in memory."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self.stream, self.text, self.at, self._passed = stream, "", 0, 1
        self._decoder = json.JSONDecoder(object_pairs_hook=_noted)

    @property
    def line(self) -> int:
        """The line on which the next value begins, from 1."""
        return self._passed + self.text.count("\n", 0, self.at)

    def next_char(self) -> str:
        """The next character that is not blank; "" at the end."""
        while True:
            self.at = _BLANKS.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def take(self, char: str) -> None:
        if self.next_char() != char:
            raise ValueError(f"no {char!r} where one should be")
        self.at += 1

    def value(self) -> Any:
        self.next_char()
        while True:
            try:
                value, self.at = self._decoder.raw_decode(self.text, self.at)
                return value
            except ValueError as error:
                if "\0" in self.text:
                    raise ValueError(_NULS) from None
                if not self._more():
                    raise error

    def _more(self) -> bool:
        """Read on; as much again as is held: a long value is not decoded again and again."""
        self._passed += self.text.count("\n", 0, self.at)
        self.text, self.at = self.text[self.at :], 0
        more = self.stream.read(max(_CHUNK, len(self.text)))
        self.text += more
        return bool(more)


def _parquet_rows(path: Path, key: str, column: str | None) -> Iterator[dict[str, Any]]:
    import pyarrow  # late: takes a moment
    from pyarrow import parquet

    with reading(path, key), path.open("rb") as file:  # opened here: Arrow takes names for addresses
        try:
            table = parquet.ParquetFile(file)
            names = table.schema_arrow.names
            if twice := {name for name in names if names.count(name) > 1}:
                raise refusal(path, key, f"has two columns {', '.join(sorted(twice))}; rename one")
            if column and column not in names and table.metadata.num_rows:
                yield dict.fromkeys(names)  # it says what there is
            for batch in table.iter_batches(_PARQUET_ROWS, columns=[column] if column in names else None):
                yield from batch.to_pylist()
        except (ValueError, OverflowError, OSError, pyarrow.ArrowException) as error:
            if isinstance(error, ConfigError) or getattr(error, "errno", None):
                raise
            raise _broken(path, key, "parquet", " ".join(str(error).split())) from None
