"""Data: readers, tokenizer, rows, held-out documents, cache, order; and every bad input with the line it gives."""

import io
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from tokenizers import Tokenizer, models

from megatron_refine.config import Config, ConfigError, ModelConfig, load
from megatron_refine.data import corpus as corpus_module
from megatron_refine.data import prepare as prepare_module
from megatron_refine.data.corpus import find_corpus
from megatron_refine.data.order import sample_rows
from megatron_refine.data.packed import PackedRows
from megatron_refine.data.packing import RowRule, pack
from megatron_refine.data.prepare import prepare
from megatron_refine.data.split import share, threshold_of
from megatron_refine.data.tokenizer import bos_id, decode, encode_all, load_tokenizer, train_tokenizer

VOCAB = 300
WORDS = "the state of a fast weight memory is read by query and written by key value pairs\n".split(" ")
DOCUMENTS = [" ".join(random.Random(i).choices(WORDS, k=60 + i % 7 * 10)) + f" #{i} é☃" for i in range(40)]


class Stub(ModelConfig):
    def tp_limit(self) -> int:
        return 1


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(DOCUMENTS, VOCAB, path)
    return path


def write(folder: Path, texts: list[str]) -> Path:
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:03}.txt").write_bytes(text.encode())
    return folder


@pytest.fixture
def settings(tmp_path, tokenizer_path):
    """settings(**data) -> Config: forty text files, a ready tokenizer, rows of 64 tokens where `data` says no other."""
    folder = write(tmp_path / "corpus", DOCUMENTS)

    def make(vocab_size: int = VOCAB, paths: object = folder, tokenizer: object = tokenizer_path, **data) -> Config:
        model = {"family": "stub", "vocab_size": vocab_size, "hidden_size": 8, "num_layers": 1, "intermediate_size": 8}
        base = {"seq_length": 64, "cache_dir": str(tmp_path / "cache"), "valid_fraction": 0.2}
        data = {**base, "paths": [str(paths)], "tokenizer": str(tokenizer), **data}
        tree = {"model": model, "data": data, "refine": {"enabled": False}}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
        return load(tmp_path / "config.yaml", [], {"stub": Stub})

    return make


def contents(rows: PackedRows) -> list[list[int]]:
    return [rows.row(i).tolist() for i in range(len(rows))]


def failure(config: Config) -> str:
    """The one line with which preparing fails."""
    with pytest.raises(ConfigError) as caught:
        prepare(config)
    assert "\n" not in str(caught.value)
    assert not list(Path(config.data.cache_dir).glob(".*.tmp")), "an unfinished folder stayed"
    return str(caught.value)


def parquet(**columns: object) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), stream)
    return stream.getvalue()


# Rows
def test_row_rules(settings):
    text = list(range(10, 31))  # 21 tokens
    ids = np.array(text)

    def rows(*rule):
        return [row.tolist() for row in RowRule(*rule).rows(ids)]

    assert rows(8, 8, False, None) == [text[:8]]
    assert rows(8, 8, True, None) == rows(8, 6, True, None) == [text[:8], text[8:16]]  # a rest of 5 is dropped
    assert rows(8, 5, True, None) == [text[:8], text[8:16], text[16:]]  # and kept
    assert rows(32, 21, False, None) == [text]
    assert rows(32, 22, False, None) == rows(32, 22, True, None) == []
    assert rows(8, 8, False, 1) == [[1, *text[:7]]]
    assert rows(8, 8, True, 1) == [[1, *text[:7]], [1, *text[7:14]], [1, *text[14:]]]
    assert rows(32, 22, False, 1) == [[1, *text]]  # BOS counts
    assert rows(32, 23, False, 1) == []
    assert RowRule(8, 2, True, 1).rows(ids[:0]) == RowRule(8, 2, False, 1).rows(ids[:0]) == []
    lengths = [RowRule.of(settings(min_length=n).data, None).min_length for n in (0, 20, 1)]
    assert lengths == [64, 20, 2]  # 0 is seq_length; a row has a token to predict


@pytest.mark.parametrize(("split", "bos"), [(False, False), (False, True), (True, False), (True, True)])
def test_prepared_rows_are_the_documents(settings, tokenizer_path, split, bos):
    config = settings(split_documents=split, add_bos=bos, min_length=40)
    prepared = prepare(config)
    tokenizer = load_tokenizer(tokenizer_path, VOCAB, "data.tokenizer")
    rule = RowRule.of(config.data, bos_id(tokenizer, tokenizer_path) if bos else None)
    expected = {"train": [], "valid": []}
    for text, ids in encode_all(tokenizer, DOCUMENTS):
        expected["valid" if share(text) < threshold_of(0.2) else "train"] += [row.tolist() for row in rule.rows(ids)]
    assert {"train": contents(prepared.train), "valid": contents(prepared.valid)} == expected
    assert prepared.train.row(0).dtype == np.uint16
    assert {row[0] == 0 for row in expected["train"]} == {bos}
    assert sum(side["documents"] for side in prepared.counts.values()) == 40
    assert prepared.counts["train"]["tokens"] == sum(map(len, expected["train"]))


def test_dropped_documents_are_counted(tmp_path, settings):
    long, short = DOCUMENTS[:6], ["a few words"] * 3
    train, valid = write(tmp_path / "a", long + short), write(tmp_path / "b", long[:2] + short[:1])
    prepared = prepare(settings(paths=train, valid_paths=[str(valid)]))
    assert prepared.counts == {
        "train": {"documents": 9, "dropped": 3, "rows": 6, "tokens": 6 * 64},
        "valid": {"documents": 3, "dropped": 1, "rows": 2, "tokens": 2 * 64},
    }
    assert contents(prepared.valid) == contents(prepared.train)[:2]


def test_batch_is_padded_right(settings):
    train = prepare(settings(seq_length=160, min_length=8)).train
    batch = train.batch([3, 0], [17, 18])
    assert str(batch.tokens.dtype) == str(batch.lengths.dtype) == str(batch.sample_ids.dtype) == "torch.int64"
    rows = [train.row(3).tolist(), train.row(0).tolist()]
    assert batch.sample_ids.tolist() == [17, 18] and len(rows[0]) != len(rows[1])
    assert batch.lengths.tolist() == [len(row) for row in rows]
    assert batch.tokens.tolist() == [row + [0] * (160 - len(row)) for row in rows]


# Readers
def test_formats_give_the_same_rows(tmp_path, settings):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"id": 1, "body": t}) for t in DOCUMENTS), "utf-8")
    (tmp_path / "a.parquet").write_bytes(parquet(body=DOCUMENTS, id=range(40)))
    paths = [tmp_path / name for name in ("corpus", "a.jsonl", "a.parquet")]
    prepared = [prepare(settings(paths=path, text_column="body")) for path in paths]
    assert len(prepared[0].train) + len(prepared[0].valid) == 40
    assert len({str([contents(p.train), contents(p.valid)]) for p in prepared}) == 1
    assert len({p.train.fingerprint for p in prepared}) == 3


def test_folders_are_read_in_order_without_hidden_files(tmp_path):
    texts = {"b/2.txt": "two\r\n", "a.md": "one", "c[1]*.jsonl": '{"text": "three"}\n\n{"text": "four\\r\\n"}\n'}
    for name, text in {**texts, ".hidden": "no", ".git/x": "no", "d.jsonl": ""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "e.parquet").write_bytes(parquet(text=pyarrow.array([], pyarrow.string())))
    documents = find_corpus([str(tmp_path)], "text", "data.paths").documents()
    assert list(documents) == ["one", "two\r\n", "three", "four\r\n"]


def test_default_corpus_is_the_standard_library():
    corpus = find_corpus([], "text", "data.paths")
    names = [name for name, _ in corpus.files]
    assert names == sorted(names) and {"argparse.py", "json/decoder.py"} <= set(names)
    assert not {"site-packages", "test", "idlelib"} & {folder for name in names for folder in Path(name).parts[:-1]}
    assert sum(map(len, corpus.documents())) > 5_000_000  # every one of them is readable


# Tokenizer
def test_trained_tokenizer_is_exact_and_deterministic(tmp_path, tokenizer_path):
    again = tmp_path / "again.json"
    program = f"from tests.test_data import *; train_tokenizer(DOCUMENTS, VOCAB, Path({str(again)!r}))"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])
    assert again.read_bytes() == tokenizer_path.read_bytes()
    vocabulary = Tokenizer.from_file(str(again)).get_vocab()
    assert set(vocabulary.values()) == set(range(VOCAB)) and (vocabulary["<bos>"], vocabulary["<eos>"]) == (0, 1)


def test_decode_inverts_encode(tmp_path, tokenizer_path):
    texts = [DOCUMENTS[0], "tabs\t\r\n  spaces  ", "日本 🙂 \x00", "a <bos> in the text", ""]
    other = Tokenizer.from_file(str(tokenizer_path))
    other.enable_truncation(5)  # a published tokenizer.json may come with either: both are ignored
    other.enable_padding(length=500)
    other.save(str(tmp_path / "t.json"))
    for path in (tokenizer_path, tmp_path / "t.json"):
        tokenizer = load_tokenizer(path, VOCAB, "data.tokenizer")
        for text, (same, ids) in zip(texts, encode_all(tokenizer, texts), strict=True):
            assert same == text and decode(path, ids) == text
            assert 0 not in ids and 1 not in ids  # text never becomes a special token


# Cache
def test_second_run_does_no_work(tmp_path, monkeypatch, settings):
    config = settings(tokenizer="")
    first = prepare(config)
    seen = [text for text in DOCUMENTS if share(text) >= threshold_of(0.2)]
    train_tokenizer(seen, VOCAB, tmp_path / "t.json")
    assert first.tokenizer.read_bytes() == (tmp_path / "t.json").read_bytes() and len(seen) < 40
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    for name in ("train_tokenizer", "pack", "encode_all"):
        monkeypatch.delattr(prepare_module, name)
    second = prepare(config)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before
    assert second.train.fingerprint == first.train.fingerprint and second.counts == first.counts


def test_a_tokenizer_is_trained_on_the_column_that_is_read(tmp_path, settings):
    """Another column of the same file is other text."""
    path = tmp_path / "rows.jsonl"
    rows = ({"letters": text, "digits": " ".join(str(ord(c)) for c in text)} for text in DOCUMENTS)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    columns = [prepare(settings(paths=path, tokenizer="", text_column=name)) for name in ("letters", "digits")]
    alone = prepare(settings(paths=path, tokenizer="", text_column="digits", cache_dir=str(tmp_path / "other")))
    assert columns[0].tokenizer != columns[1].tokenizer
    assert columns[1].tokenizer.read_bytes() == alone.tokenizer.read_bytes()


def test_fingerprint_follows_what_decides_the_rows(tmp_path, settings):
    variants = {"min_length": 64, "seq_length": 32, "split_documents": True, "add_bos": True, "valid_fraction": 0.3}
    prints = [prepare(settings(**{key: variants[key]})).train.fingerprint for key in variants]
    assert len(set(prints)) == len(variants)
    moved = (tmp_path / "corpus").rename(tmp_path / "moved")
    assert prepare(settings(paths=moved)).train.fingerprint == prints[0]
    (moved / "000.txt").write_text(DOCUMENTS[0].replace("a", "b"), encoding="utf-8")
    assert prepare(settings(paths=moved)).train.fingerprint not in prints


def test_digests_of_large_files_are_remembered(tmp_path, monkeypatch):
    corpus = find_corpus([str(write(tmp_path / "corpus", DOCUMENTS))], "text", "data.paths")
    plain = corpus.fingerprint(tmp_path)
    monkeypatch.setattr(corpus_module, "_REMEMBER_FROM", 0)
    assert corpus.fingerprint(tmp_path) == plain
    with monkeypatch.context() as patch:
        patch.delattr(corpus_module, "digest")
        assert corpus.fingerprint(tmp_path) == plain
    (tmp_path / "corpus" / "003.txt").write_text("x" * len(DOCUMENTS[3].encode()), encoding="utf-8")  # the same size
    os.utime(tmp_path / "corpus" / "003.txt", (0, 0))
    assert corpus.fingerprint(tmp_path) != plain


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damaged_cache_is_named(settings, suffix, damage):
    path = next(path for path in prepare(settings()).train.files if path.suffix == suffix)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x80
    path.unlink()
    if damage != "remove":
        path.write_bytes(content[:-2] if damage == "truncate" else content)
    message = failure(settings())
    assert message.startswith(f"{path}: ") and f"delete the folder {path.parent}" in message
    assert ("bytes, but its record says" in message) == (damage == "truncate" and suffix != ".json")
    shutil.rmtree(path.parent)
    assert len(prepare(settings()).train)  # the remedy helps


def test_two_processes_prepare_at_once(tmp_path, monkeypatch, settings):
    """The other process finishes while this one packs: its folder stays, ours goes."""
    others = []

    def slow_pack(*args):
        monkeypatch.setattr(prepare_module, "pack", pack)
        monkeypatch.setattr(prepare_module, "temporary", lambda path: path.with_name(".other.tmp"))
        others.append(prepare(settings()))
        return pack(*args)

    monkeypatch.setattr(prepare_module, "pack", slow_pack)
    mine = prepare(settings())
    assert contents(mine.train) == contents(others[0].train)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [mine.train.files[0].parent.name]


# Bad input
BAD_FILES = [
    ("a.jsonl", b'{"text": "x"}\n\n{"text": oops}\n', ["broken jsonl", "line 3"]),
    ("a.jsonl", b'{"text": "x"}\n{"te', ["broken jsonl", "line 2"]),
    ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', ["broken jsonl", "line 2", "utf-8"]),
    ("a.jsonl", b'{"body": "x", "id": 1}\n', ["data.text_column=text", "no such column", "body, id"]),
    ("a.jsonl", b'{"text": "x"}\n{"text": 5}\n', ["data.text_column=text", "row 2 holds int, not text"]),
    ("a.jsonl", b'{"text": "x"}\n{"text": null}\n', ["row 2 holds nothing"]),
    ("a.parquet", b"PAR1 not a table", ["broken parquet"]),
    ("a.parquet", parquet(text=["a", "b"])[:-40], ["broken parquet"]),
    ("a.parquet", parquet(text=[3, 4]), ["data.text_column=text", "row 1 holds int, not text"]),
    ("a.parquet", parquet(id=[1, 2]), ["data.text_column=text", "it has id"]),
    ("a.txt", b"latin \xe9", ["not UTF-8 text (byte 6)", ".jsonl and .parquet"]),
]


@pytest.mark.parametrize(("name", "content", "expected"), BAD_FILES)
def test_bad_files_are_named(tmp_path, settings, name, content, expected):
    (tmp_path / name).write_bytes(content)
    message = failure(settings(paths=tmp_path / name))
    assert not [part for part in [str(tmp_path / name), "data.paths", *expected] if part not in message], message


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_forbidden_file_is_named(tmp_path, monkeypatch, name):
    tmp_path.chmod(0o755)
    (tmp_path / name).write_text('{"text": "x"}', encoding="utf-8")
    (tmp_path / name).chmod(0)
    monkeypatch.chdir(tmp_path)
    corpus = find_corpus([name], "text", "data.paths")
    user = os.geteuid()
    try:
        os.seteuid(user or 65534)  # root may read anything
        for read in (lambda: corpus.fingerprint(tmp_path), lambda: list(corpus.documents())):
            with pytest.raises(ConfigError, match=f"data.paths: {name}: cannot be read: .*[Pp]ermission"):
                read()
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("key", ["paths", "valid_paths"])
def test_paths_without_documents_are_named(tmp_path, settings, key):
    def message(name: str) -> str:
        path = tmp_path / name
        return failure(settings(**{key: path if key == "paths" else [str(path)]}, add_bos=True))

    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.jsonl").touch()
    (tmp_path / "short.txt").write_text("ab", encoding="utf-8")
    assert f"data.{key}: {tmp_path}/missing: no such" in message("missing")
    assert f"data.{key}: {tmp_path}/empty: the folder holds no" in message("empty")
    assert f"data.{key}: no documents in 1 files" in message("blank.jsonl")
    short = "no document is long enough: the longest has 3 tokens, a row needs 64; lower data.min_length"
    assert f"data.{key}: {short}" in message("short.txt")
    assert "no documents in 1 files" in failure(settings(paths=tmp_path / "blank.jsonl", tokenizer=""))


def test_bad_tokenizers_and_cache_folders_are_named(tmp_path, settings, tokenizer_path):
    path = tmp_path / "t.json"
    assert f"data.tokenizer: {path}: no such file" in failure(settings(tokenizer=path))
    path.write_bytes(tokenizer_path.read_bytes()[:-20])
    assert f"data.tokenizer: {path}: is not a valid tokenizer.json" in failure(settings(tokenizer=path))
    assert f"{tokenizer_path}: has token ids up to 299, but model.vocab_size=299" in failure(settings(vocab_size=299))
    Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")).save(str(path))
    assert f"data.add_bos=true: {path} has none of the tokens <bos>" in failure(settings(tokenizer=path, add_bos=True))
    (tmp_path / "in_the_way").touch()
    assert f"data.cache_dir={tmp_path}/in_the_way: " in failure(settings(cache_dir=f"{tmp_path}/in_the_way"))


def test_vocabularies_that_cannot_be_trained_are_named(settings):
    assert "model.vocab_size=257: a byte-level BPE needs 258" in failure(settings(257, tokenizer=""))
    message = failure(settings(5000, tokenizer=""))
    size = int(message.split("a vocabulary of ")[1].split()[0])
    assert message.startswith("model.vocab_size=5000: ") and f"lower it to {size}" in message
    assert len(prepare(settings(size, tokenizer="")).train)  # the remedy helps


# Order
def test_each_epoch_is_a_permutation():
    stream = sample_rows(1, 0, 3 * 50, 50).reshape(3, 50)
    assert np.array_equal(np.sort(stream), np.tile(np.arange(50), (3, 1))) and stream.dtype == np.int64
    assert len({tuple(epoch) for epoch in stream}) == 3
    assert len({tuple(sample_rows(seed, 0, 50, 50)) for seed in range(20)}) == 20
    pinned = [[3, 5, 2, 7, 0, 6, 1, 4], [0, 6, 5, 3, 4, 7, 2, 1]]  # for ever: checkpoints resume by it
    assert sample_rows(1, 0, 16, 8).reshape(2, 8).tolist() == pinned
    assert len({tuple(sample_rows(seed, 0, 150, 50)[i : i + 50]) for seed in range(5) for i in (0, 50, 100)}) == 15


def test_samples_do_not_depend_on_where_one_starts():
    whole = sample_rows(7, 0, 101, 10)
    for size in (1, 3, 7, 10, 23):
        pieces = [sample_rows(7, first, min(size, 101 - first), 10) for first in range(0, 101, size)]
        assert np.array_equal(np.concatenate(pieces), whole)
    assert np.array_equal(sample_rows(7, 8, 4, 10), whole[8:12])  # across the edge of an epoch
    rows = sample_rows(3, 0, 8, 3)  # a set smaller than a batch
    assert sorted(rows[:3]) == sorted(rows[3:6]) == [0, 1, 2] and set(rows[6:]) < {0, 1, 2}
    assert sample_rows(3, 5, 4, 1).tolist() == [0, 0, 0, 0] and len(sample_rows(3, 5, 0, 3)) == 0


def test_command_line_prints_the_counts(tmp_path, monkeypatch, capsys, settings, tokenizer_path):
    from megatron_refine.cli.prepare import main

    monkeypatch.setitem(sys.modules, "megatron_refine.models.family", type("family", (), {"FAMILIES": {"stub": Stub}}))
    arguments = ["--config", str(tmp_path / "config.yaml")]
    settings()
    assert main([*arguments, "data.min_length=40"]) == 0
    shown = capsys.readouterr().out
    assert str(tokenizer_path) in shown and "train  documents" in shown and shown.count(".bin") == 2
    assert main([*arguments, "data.paths=[/missing]"]) == 2
    assert "data.paths: /missing: no such file or folder" in capsys.readouterr().err
