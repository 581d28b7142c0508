"""Examples from files: what is read, what each odd character becomes, and every bad input with the line it gives."""

import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_refine.config import ConfigError
from megatron_refine.data.examples import Columns, Example, read_examples
from megatron_refine.data.readers import read_documents


def parquet(**columns: object) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), stream)
    return stream.getvalue()


def jsonl(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read(folder: Path, content: bytes, name: str = "qasper_16384.jsonl", columns: Columns | None = None, **options):
    (folder / name).write_bytes(content)
    return read_examples([str(folder / name)], columns or Columns(), "data.eval", **options)


def failure(*arguments, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        read(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_rows_become_examples(tmp_path):
    rows = [
        {"prompt": "p", "answers": ["a|b", "c"], "max_gen_tokens": 32, "task": "trec", "prompt_length": 1},
        {"prompt": "q\n", "answers": ["d"], "max_gen_tokens": 64, "task": "lcc", "prompt_length": 2},
    ]
    expected = [Example("trec", 0, "p", ("a|b", "c"), 32), Example("lcc", 1, "q\n", ("d",), 64)]
    assert read(tmp_path, jsonl(*rows)) == expected
    table = parquet(**{name: [row[name] for row in rows] for name in rows[0]})
    assert read(tmp_path, table, name="a.parquet") == expected


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("qasper_16384.jsonl", "qasper"),
        ("repobench-p_16384.jsonl", "repobench-p"),
        ("2wikimqa_16384.jsonl", "2wikimqa"),
        ("ruler_squadqa_delta_net_4096_200_test.jsonl", "ruler_squadqa_delta_net"),
        ("notes.jsonl", "notes"),
        ("4096.jsonl", "4096"),
    ],
)
def test_what_a_row_does_not_say(tmp_path, name, task):
    content = jsonl({"prompt": "p", "answer": "a"}, {"prompt": "q", "answer": ["b"], "task": None})
    assert read(tmp_path, content, name) == [Example(task, 0, "p", ("a",), 128), Example(task, 1, "q", ("b",), 128)]
    assert {(e.task, e.max_new_tokens) for e in read(tmp_path, content, name, task="x", max_new_tokens=5)} == {("x", 5)}


def test_columns_by_name(tmp_path):
    row = {"prompt": "not this", "question": "q", "gold": "a", "answers": ["no"], "set": "s", "limit": 3}
    columns = Columns(prompt="question", answers="gold", task="set", max_new_tokens="limit")
    assert read(tmp_path, jsonl(row), columns=columns) == [Example("s", 0, "q", ("a",), 3)]
    assert "column set holds nothing" in failure(tmp_path, jsonl(row | {"set": None}), columns=columns)
    assert "has no column limit; it has" in failure(
        tmp_path, jsonl({"question": "q", "gold": "a", "set": "s"}), columns=columns
    )


def test_files_and_folders_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_bytes(jsonl({"prompt": name, "answer": "x"}))
    found = read_examples([str(tmp_path), str(tmp_path / "b.jsonl")], Columns(), "data.eval")
    assert [(e.index, e.prompt, e.task) for e in found] == [
        (0, "a.jsonl", "a"),
        (1, "b.jsonl", "b"),
        (2, "b.jsonl", "b"),
    ]


ODD = {
    "NUL": "a\0b",
    "line ends": "a\r\nb\rc\n",
    "separators": "a\u2028b\u2029c\x85d\x0be",
    "emoji": "a😀👩‍👩‍👧é",
    "mark": "\ufeffa",
    "a date": "2011-05-03",
    "a number": "1e5",
    "blank": " \t ",
}


@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
@pytest.mark.parametrize("escaped", [True, False], ids=["escaped", "raw"])
def test_odd_characters_stay(tmp_path, text, escaped):
    """Also all rows of a file: `datasets` makes dates of texts that look like dates where all of them do."""
    content = json.dumps({"prompt": text, "answers": [text]}, ensure_ascii=escaped) + "\r\n\n"
    assert read(tmp_path, b"\xef\xbb\xbf" + content.encode() * 3) == [
        Example("qasper", i, text, (text,), 128) for i in range(3)
    ]
    assert read(tmp_path, parquet(prompt=[text], answers=[[text]]), "a.parquet")[0].references == (text,)
    (tmp_path / "a.jsonl").write_text(content, encoding="utf-8")
    assert list(read_documents(tmp_path / "a.jsonl", "prompt", "data.paths")) == [text]


def test_half_a_surrogate_pair_is_refused(tmp_path):
    whole = b'{"prompt": "\\ud83d\\ude00", "answers": ["a"]}\n'
    assert read(tmp_path, whole)[0].prompt == "😀"
    message = failure(tmp_path, whole + b'{"prompt": "ok", "answers": ["a", "b\\ud83d"]}\n')
    assert "row 2: column answers holds half a surrogate pair at character 1, not text; fix the row" in message
    with pytest.raises(ConfigError, match="row 2 holds half a surrogate pair at character 0"):
        (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "\\udc00"}', encoding="utf-8")
        list(read_documents(tmp_path / "a.jsonl", "text", "data.paths"))


GOOD = {"prompt": "p", "answers": ["a"]}
BAD_ROWS = [
    ({"answers": ["a"], "id": 1}, "has no column prompt; it has answers, id: name one of these"),
    ({"prompt": "p", "id": 1}, "has no column answers or answer; it has prompt, id: name one of these"),
    ({}, "has no column prompt; it has none"),
    (GOOD | {"prompt": None}, "column prompt holds nothing (null or missing); fix the row or name another column"),
    (GOOD | {"prompt": 5}, "column prompt holds int, not text; fix the row"),
    (GOOD | {"prompt": ["p"]}, "column prompt holds list, not text"),
    (GOOD | {"prompt": ""}, "column prompt holds an empty text"),
    (GOOD | {"answers": None}, "column answers holds nothing (null or missing)"),
    (GOOD | {"answers": []}, "column answers holds an empty list, no answer"),
    (GOOD | {"answers": ["a", 3]}, "column answers holds int, not text"),
    (GOOD | {"answers": ["a", None]}, "column answers holds nothing"),
    (GOOD | {"answers": [["a"]]}, "column answers holds list, not text"),
    (GOOD | {"answers": {"text": "a"}}, "column answers holds dict, not text"),
    (GOOD | {"answers": ""}, "column answers holds an empty text"),
    (GOOD | {"answers": ["a", ""]}, "column answers holds an empty text"),
    (GOOD | {"max_gen_tokens": 0}, "column max_gen_tokens holds 0, not a whole number of 1 or more"),
    (GOOD | {"max_gen_tokens": -3}, "holds -3, not a whole"),
    (GOOD | {"max_gen_tokens": 32.0}, "holds 32.0, not a whole"),
    (GOOD | {"max_gen_tokens": True}, "holds True, not a whole"),
    (GOOD | {"max_gen_tokens": "32"}, "holds '32', not a whole"),
    (GOOD | {"task": 7}, "column task holds int, not text"),
    (GOOD | {"task": ""}, "column task holds an empty text"),
]


@pytest.mark.parametrize(("row", "expected"), BAD_ROWS)
def test_bad_rows_are_named(tmp_path, row, expected):
    message = failure(tmp_path, jsonl(GOOD, row))
    assert message.startswith(f"data.eval: {tmp_path}/qasper_16384.jsonl: row 2: ") and expected in message, message


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"prompt": [3], "answers": ["a"]}, "row 1: column prompt holds int, not text"),
        ({"prompt": ["p"], "answers": pyarrow.array([None], pyarrow.list_(pyarrow.string()))}, "holds nothing"),
        ({"prompt": ["p", "q"], "answers": [["a"], []]}, "row 2: column answers holds an empty list"),
        ({"prompt": ["p"], "answers": [["a"]], "max_gen_tokens": [4.0]}, "holds 4.0"),
        ({"text": ["p"]}, "row 1: has no column prompt; it has text"),
        ({"prompt": pyarrow.array([], pyarrow.string())}, "holds no rows; fill it or leave it out"),
    ],
)
def test_bad_parquet_rows_are_named(tmp_path, columns, expected):
    message = failure(tmp_path, parquet(**columns), "a.parquet")
    assert message.startswith(f"data.eval: {tmp_path}/a.parquet: ") and expected in message, message


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", jsonl(GOOD) + b'{"prompt": oops}', "broken jsonl file: line 2: "),
        ("a.jsonl", jsonl(GOOD, [1]), "broken jsonl file: line 2: list, not an object; repair it"),
        ("a.jsonl", jsonl(GOOD) + b'{"prompt": "\xff"}', "line 2: 'utf-8' codec"),
        ("a.jsonl", b"\n\n", "holds no rows"),
        ("a.jsonl", b"", "holds no rows"),
        ("a.parquet", b"PAR1 not a table", "broken parquet file: "),
        ("a.parquet", parquet(prompt=["p"], answers=["a"])[:-9], "broken parquet file: "),
        ("a.csv", b"prompt,answers", "is not a table (known by their names: .jsonl and .parquet); convert or rename"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, expected):
    message = failure(tmp_path, content, name)
    assert message.startswith(f"data.eval: {tmp_path}/{name}: ") and expected in message, message


def test_paths_that_are_not_there(tmp_path):
    with pytest.raises(ConfigError, match="data.eval: names no files; name .jsonl"):
        read_examples([], Columns(), "data.eval")
    with pytest.raises(ConfigError, match="data.eval: .*gone.jsonl: no such file or folder; correct the path"):
        read_examples([str(tmp_path / "gone.jsonl")], Columns(), "data.eval")
