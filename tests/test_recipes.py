"""docs/recipes.md: its command lines are accepted, and its filters and counts are so, on a small stand-in."""

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_refine.cli.prepare import main
from megatron_refine.config import load
from megatron_refine.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_refine.models.family import FAMILIES
from tests.test_docs import commands

LINES = [words[1:] for page, words in commands() if page == "recipes.md"]
WORDS = "the river runs past a field of tall grass and under the bridge of stone ".split()


def configuration(line: list[str]) -> tuple[list[str], list[str]]:
    """The files and the overrides of a command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", action="append")
    parser.add_argument("--ranks", type=int)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args(line[1:])
    return options.config, options.overrides


@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line[0]} {line[-1]}"[-40:])
def test_the_command_lines_are_accepted(line: list[str]) -> None:
    if line[0] in ("prepare", "train"):
        load(*configuration(line), FAMILIES)
    else:
        import_module(f"megatron_refine.cli.{line[0].replace('-', '_')}").parse(line[1:])


def test_every_kind_of_command_is_there() -> None:
    assert {line[0] for line in LINES} == {"prepare", "train", "ruler-qa", "evaluate"} and len(LINES) == 9


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files with the columns of the data sets: two documents of six are long; three held-out ones of any length."""
    texts = [" ".join(WORDS[i % len(WORDS)] for i in range(count)) for count in (30, 200, 31, 32, 300, 33)]
    meta = [{"redpajama_set_name": "RedPajamaBook"}] * len(texts)
    table = pa.table({"text": texts, "meta": meta, "__index_level_0__": list(range(len(texts)))})
    (tmp_path / "slimpajama/data").mkdir(parents=True)
    pq.write_table(table, tmp_path / "slimpajama/data/train-00000-of-00001.parquet")
    pq.write_table(pa.table({"text": ["one", texts[0], texts[4]]}), tmp_path / "booksum.parquet")
    train_tokenizer(texts, 258 + 20, tmp_path / "tokenizer.json")
    return tmp_path


@pytest.mark.parametrize("held_out", [False, True])
def test_short_documents_are_dropped_and_counted(folder: Path, held_out: bool, capsys: Any, monkeypatch: Any) -> None:
    """By the page's own lines, at a smaller length."""
    line = next(line for line in LINES if line[0] == "prepare" and ("booksum" in " ".join(line)) == held_out)
    length = 100
    smaller = [f"data.seq_length={length}", "data.min_length=0", "data.tokenizer=tokenizer.json"]
    monkeypatch.chdir(folder)
    assert main([*line[1:], *smaller]) == 0
    said = {words[0]: words[1:] for words in map(str.split, capsys.readouterr().out.splitlines()) if words}
    tokenizer = load_tokenizer(folder / "tokenizer.json", 32000, "")
    if held_out:
        found = pq.read_table(folder / "booksum.parquet")["text"].to_pylist()
        tokens = sum(min(len(ids), length) for ids in tokenizer.encode(found))
        assert said["train"] == f"documents 6 dropped 4 rows 2 tokens {2 * length}".split()
        assert said["valid"] == f"documents 3 dropped 0 rows 3 tokens {tokens}".split()
    else:  # a twentieth of the documents is held out
        both = zip(said["train"][1::2], said["valid"][1::2], strict=True)
        assert [int(a) + int(b) for a, b in both] == [6, 4, 2, 2 * length]
