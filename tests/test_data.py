"""Data: readers, tokenizer, rows, held-out documents, cache, order; and every bad input with the line it gives."""

import importlib.util
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
from megatron_refine.data.packed import Rows
from megatron_refine.data.packing import RowRule, pack
from megatron_refine.data.prepare import prepare
from megatron_refine.data.split import share, threshold_of
from megatron_refine.data.tokenizer import bos_id, decode, encode_all, load_tokenizer, train_tokenizer

VOCAB = 300
WORDS = "the state of a fast weight memory is read by query and written by key value pairs\n".split(" ")


class Stub(ModelConfig):
    def tp_limit(self) -> int:
        return 1


def text_of(words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words)) + f" #{seed} é☃"


DOCUMENTS = [text_of(60 + 10 * (i % 7), i) for i in range(40)]


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(DOCUMENTS, VOCAB, path)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """Forty text files."""
    return write_texts(tmp_path / "corpus", DOCUMENTS)


def write_texts(folder: Path, texts: list[str]) -> Path:
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:03}.txt").write_bytes(text.encode())
    return folder


def settings(tmp_path: Path, vocab_size: int = VOCAB, **data) -> Config:
    tree = {
        "model": {"family": "stub", "vocab_size": vocab_size, "hidden_size": 8, "num_layers": 1, "intermediate_size": 8},
        "data": {"seq_length": 64, "cache_dir": str(tmp_path / "cache"), "valid_fraction": 0.2, **data},
        "refine": {"enabled": False},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load(path, [], {"stub": Stub})


def all_rows(rows: Rows) -> list[list[int]]:
    return [rows.row(i).tolist() for i in range(len(rows))]


def fails(config: Config) -> str:
    """The one line with which preparing fails."""
    with pytest.raises(ConfigError) as caught:
        prepare(config)
    message = str(caught.value)
    assert "\n" not in message
    cache = Path(config.data.cache_dir)
    assert not cache.exists() or not [p for p in cache.iterdir() if p.name.endswith(".tmp")], "an unfinished folder stayed"
    return message


# Rows


def test_row_rules():
    ids = np.arange(10, 31)  # 21 tokens

    def rows(*rule):
        return [row.tolist() for row in RowRule(*rule).rows(ids)]

    text = ids.tolist()
    assert rows(8, 8, False, None) == [text[:8]]
    assert rows(8, 8, True, None) == [text[:8], text[8:16]]  # a rest of 5 is dropped
    assert rows(8, 5, True, None) == [text[:8], text[8:16], text[16:]]  # and kept
    assert rows(8, 6, True, None) == [text[:8], text[8:16]]
    assert rows(32, 21, False, None) == [text]
    assert rows(32, 22, False, None) == rows(32, 22, True, None) == []
    assert rows(8, 8, False, 1) == [[1, *text[:7]]]
    assert rows(8, 8, True, 1) == [[1, *text[:7]], [1, *text[7:14]], [1, *text[14:]]]
    assert rows(32, 22, False, 1) == [[1, *text]]  # BOS counts
    assert rows(32, 23, False, 1) == []
    assert RowRule(8, 2, True, 1).rows(ids[:0]) == RowRule(8, 2, False, 1).rows(ids[:0]) == []


def test_min_length_zero_is_seq_length(tmp_path):
    assert RowRule.of(settings(tmp_path).data, None).min_length == 64
    assert RowRule.of(settings(tmp_path, min_length=20).data, None).min_length == 20
    assert RowRule.of(settings(tmp_path, min_length=1).data, None).min_length == 2  # a row has a token to predict


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_prepared_rows_are_the_documents(tmp_path, folder, tokenizer_path, split, bos):
    config = settings(
        tmp_path, paths=[str(folder)], tokenizer=str(tokenizer_path), split_documents=split, add_bos=bos, min_length=40
    )
    prepared = prepare(config)
    tokenizer = load_tokenizer(tokenizer_path, VOCAB, "data.tokenizer")
    rule = RowRule.of(config.data, bos_id(tokenizer, tokenizer_path) if bos else None)
    expected = {"train": [], "valid": []}
    for text, ids in encode_all(tokenizer, DOCUMENTS):
        expected["valid" if share(text) < threshold_of(0.2) else "train"] += [row.tolist() for row in rule.rows(ids)]
    assert all_rows(prepared.train) == expected["train"]
    assert all_rows(prepared.valid) == expected["valid"]
    assert prepared.train.row(0).dtype == np.uint16
    assert prepared.train.row(0)[0] == 0 or not bos
    assert sum(side["documents"] for side in prepared.counts.values()) == 40
    assert prepared.counts["train"]["tokens"] == sum(map(len, expected["train"]))


def test_counts_of_dropped_documents(tmp_path, tokenizer_path):
    long, short = DOCUMENTS[:6], ["a few words"] * 3
    train, valid = write_texts(tmp_path / "a", long + short), write_texts(tmp_path / "b", long[:2] + short[:1])
    prepared = prepare(
        settings(tmp_path, paths=[str(train)], valid_paths=[str(valid)], tokenizer=str(tokenizer_path))
    )
    assert prepared.counts == {
        "train": {"documents": 9, "dropped": 3, "rows": 6, "tokens": 6 * 64},
        "valid": {"documents": 3, "dropped": 1, "rows": 2, "tokens": 2 * 64},
    }
    assert all_rows(prepared.valid) == all_rows(prepared.train)[:2]


def test_wide_vocabulary_is_packed_as_int32(tmp_path):
    ids = np.array([5, 70000, 1 << 16])
    pack([("train", ids), ("valid", ids)], tmp_path, RowRule(8, 2, False, None), 1 << 17, "f")
    rows = Rows(tmp_path / "train", 1 << 17)
    assert rows.row(0).dtype == np.int32 and rows.row(0).tolist() == ids.tolist()


def test_batch_is_padded_right(tmp_path, folder, tokenizer_path):
    train = prepare(settings(tmp_path, paths=[str(folder)], tokenizer=str(tokenizer_path), seq_length=128, min_length=8)).train
    batch = train.batch([3, 0], [17, 18])
    assert batch.tokens.shape == (2, 128) and batch.tokens.dtype == batch.lengths.dtype == batch.sample_ids.dtype
    assert batch.sample_ids.tolist() == [17, 18]
    assert len({len(row) for row in all_rows(train)}) > 1 and min(batch.lengths) < 128
    for b, index in enumerate([3, 0]):
        row = train.row(index).tolist()
        assert batch.lengths[b] == len(row)
        assert batch.tokens[b].tolist() == row + [0] * (128 - len(row))


# Held-out documents


def test_no_document_stands_on_both_sides(tmp_path, tokenizer_path):
    folder = write_texts(tmp_path / "corpus", DOCUMENTS + DOCUMENTS)  # every text twice
    prepared = prepare(
        settings(tmp_path, paths=[str(folder)], tokenizer=str(tokenizer_path), split_documents=True, min_length=8)
    )
    train, valid = ({tuple(row) for row in all_rows(rows)} for rows in (prepared.train, prepared.valid))
    assert train and valid and not train & valid
    assert len(valid) < len(train)


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_each_side_has_a_document(tmp_path, folder, fraction):
    prepared = prepare(settings(tmp_path, paths=[str(folder)], valid_fraction=fraction))
    small, large = sorted([prepared.train, prepared.valid], key=len)
    assert (len(small), len(large)) == (1, 39)
    assert (small is prepared.valid) == (fraction < 0.5)


def test_one_usable_document_is_not_enough(tmp_path, tokenizer_path):
    folder = write_texts(tmp_path / "corpus", [DOCUMENTS[0], DOCUMENTS[0], "short"])
    message = fails(settings(tmp_path, paths=[str(folder)], tokenizer=str(tokenizer_path)))
    assert "only one document has the 64 tokens" in message and "data.valid_paths" in message


# Readers


def test_formats_give_the_same_rows(tmp_path, folder, tokenizer_path):
    lines = tmp_path / "a.jsonl"
    lines.write_text("\n".join(json.dumps({"id": i, "body": text}) for i, text in enumerate(DOCUMENTS)))
    table = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": DOCUMENTS, "id": range(40)}), table)
    first, *others = (
        prepare(settings(tmp_path, paths=[str(path)], tokenizer=str(tokenizer_path), text_column="body"))
        for path in (folder, lines, table)
    )
    assert len(first.train) + len(first.valid) == 40
    for other in others:
        assert all_rows(other.train) == all_rows(first.train) and all_rows(other.valid) == all_rows(first.valid)
        assert other.train.fingerprint != first.train.fingerprint


def test_folders_are_read_in_order_without_hidden_files(tmp_path):
    texts = {"b/2.txt": "two\r\n", "a.md": "one", "c[1]*.jsonl": '{"text": "three"}\n\n{"text": "four\\r\\n"}\n'}
    for name, text in {**texts, ".hidden": "no", ".git/x": "no", "d.jsonl": ""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "e.parquet")
    assert list(find_corpus([str(tmp_path)], "text", "data.paths").documents()) == ["one", "two\r\n", "three", "four\r\n"]


def test_default_corpus_is_the_standard_library():
    corpus = find_corpus([], "text", "data.paths")
    names = [name for name, _ in corpus.files]
    assert names == sorted(names) and {"argparse.py", "json/decoder.py"} <= set(names)
    folders = {folder for name in names for folder in Path(name).parts[:-1]}
    assert not folders & {"site-packages", "test", "idlelib"}
    assert all(name.endswith(".py") for name in names)
    assert sum(map(len, corpus.documents())) > 5_000_000  # every one of them is readable


# Tokenizer


def test_trained_tokenizer_is_exact_and_deterministic(tmp_path, tokenizer_path):
    program = (
        "import sys; from pathlib import Path; from megatron_refine.data.tokenizer import train_tokenizer as t;"
        f"t(Path(sys.argv[1]).read_text().split(chr(0)), {VOCAB}, Path(sys.argv[2]))"
    )
    (tmp_path / "texts").write_text("\0".join(DOCUMENTS))
    again = tmp_path / "again.json"
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "texts"), str(again)], check=True, timeout=60)
    assert again.read_bytes() == tokenizer_path.read_bytes()
    tokenizer = Tokenizer.from_file(str(again))
    assert tokenizer.get_vocab_size() == VOCAB
    assert set(tokenizer.get_vocab().values()) == set(range(VOCAB))
    assert (tokenizer.token_to_id("<bos>"), tokenizer.token_to_id("<eos>")) == (0, 1)


def test_decode_inverts_encode(tokenizer_path):
    texts = [DOCUMENTS[0], "tabs\t\r\n  spaces  ", "日本 🙂 \x00", "a <bos> in the text", ""]
    tokenizer = load_tokenizer(tokenizer_path, VOCAB, "data.tokenizer")
    for text, (same, ids) in zip(texts, encode_all(tokenizer, texts), strict=True):
        assert same == text and decode(tokenizer_path, ids) == text
        assert 0 not in ids and 1 not in ids  # text never becomes a special token


def test_tokenizer_is_trained_on_the_training_side(tmp_path, monkeypatch, folder):
    seen: list[str] = []

    def spy(texts, *args):
        seen.extend(texts)
        train_tokenizer(seen, *args)

    monkeypatch.setattr(prepare_module, "train_tokenizer", spy)
    prepare(settings(tmp_path, paths=[str(folder)]))
    assert seen == [text for text in DOCUMENTS if share(text) >= threshold_of(0.2)] and len(seen) < 40


def test_truncation_and_padding_of_a_tokenizer_are_ignored(tmp_path, tokenizer_path):
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=500)
    tokenizer.save(str(tmp_path / "t.json"))
    lengths = [
        len(ids)
        for path in (tokenizer_path, tmp_path / "t.json")
        for _, ids in encode_all(load_tokenizer(path, VOCAB, "data.tokenizer"), DOCUMENTS[:1])
    ]
    assert lengths[0] == lengths[1] > 5


# Cache


def test_second_run_does_no_work(tmp_path, monkeypatch, folder):
    config = settings(tmp_path, paths=[str(folder)])
    first = prepare(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}

    def work(*args):
        raise AssertionError("work was done again")

    for name in ("train_tokenizer", "pack", "encode_all"):
        monkeypatch.setattr(prepare_module, name, work)
    second = prepare(config)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before
    assert second.train.fingerprint == first.train.fingerprint and second.counts == first.counts


def test_fingerprint_follows_what_decides_the_rows(tmp_path, folder, tokenizer_path):
    base = {"paths": [str(folder)], "tokenizer": str(tokenizer_path)}
    variants = [{}, {"seq_length": 32}, {"min_length": 9}, {"split_documents": True}, {"add_bos": True}, {"valid_fraction": 0.3}]
    prints = [prepare(settings(tmp_path, **base, **variant)).train.fingerprint for variant in variants]
    assert len(set(prints)) == len(variants)
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert prepare(settings(tmp_path, paths=[str(moved)], tokenizer=str(tokenizer_path))).train.fingerprint == prints[0]
    (moved / "000.txt").write_text(DOCUMENTS[0].replace("a", "b"))
    changed = prepare(settings(tmp_path, paths=[str(moved)], tokenizer=str(tokenizer_path)))
    assert changed.train.fingerprint not in prints


def test_digests_of_large_files_are_remembered(tmp_path, monkeypatch, folder):
    corpus = find_corpus([str(folder)], "text", "data.paths")
    plain = corpus.fingerprint(tmp_path)
    monkeypatch.setattr(corpus_module, "_REMEMBER_FROM", 0)
    assert corpus.fingerprint(tmp_path) == plain
    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, "digest", lambda path: "read again")
        assert corpus.fingerprint(tmp_path) == plain
    (folder / "003.txt").write_text("changed")
    assert corpus.fingerprint(tmp_path) != plain


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damaged_cache_is_named(tmp_path, folder, tokenizer_path, suffix, damage):
    config = settings(tmp_path, paths=[str(folder)], tokenizer=str(tokenizer_path))
    path = next(path for path in prepare(config).train.files if path.suffix == suffix)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x80
    if damage == "truncate":
        os.truncate(path, path.stat().st_size - 2)
    elif damage == "flip":
        path.write_bytes(content)
    else:
        path.unlink()
    message = fails(config)
    assert message.startswith(f"{path}: ") and f"delete the folder {path.parent}" in message
    shutil.rmtree(path.parent)  # the remedy helps
    assert len(prepare(config).train)


def test_two_processes_prepare_at_once(tmp_path, monkeypatch, folder, tokenizer_path):
    """The other process finishes while this one packs: its folder stays, ours goes."""
    config = settings(tmp_path, paths=[str(folder)], tokenizer=str(tokenizer_path))
    others = []

    def slow_pack(*args):
        records = pack(*args)
        if not others:
            others.append(None)
            monkeypatch.setattr(prepare_module, "temporary", lambda path: path.with_name(f".{path.name}.other.tmp"))
            others[0] = prepare(config)
        return records

    monkeypatch.setattr(prepare_module, "pack", slow_pack)
    mine = prepare(config)
    assert all_rows(mine.train) == all_rows(others[0].train)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [mine.train.files[0].parent.name]


def test_interrupted_preparation_leaves_nothing(tmp_path, monkeypatch, folder, tokenizer_path):
    config = settings(tmp_path, paths=[str(folder)], tokenizer=str(tokenizer_path))
    with monkeypatch.context() as patch:
        patch.setattr(RowRule, "rows", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(prepare(config).train)


# Bad input


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": oops}\n', ["broken jsonl", "line 3"]),
        ("a.jsonl", b'{"text": "x"}\n{"te', ["broken jsonl", "line 2"]),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', ["broken jsonl", "line 2", "utf-8"]),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', ["data.text_column=text", "no such column", "body, id"]),
        ("a.jsonl", b'{"text": "x"}\n{"text": 5}\n', ["data.text_column=text", "row 2 holds int, not text"]),
        ("a.jsonl", b'{"text": "x"}\n{"text": null}\n', ["data.text_column=text", "row 2 holds nothing"]),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', ["data.text_column=text", "row 2 holds nothing"]),
        ("a.parquet", b"PAR1 not a table", ["broken parquet"]),
        ("a.txt", b"latin \xe9", ["not UTF-8 text (byte 6)", ".jsonl and .parquet"]),
    ],
)
def test_unreadable_content_is_named(tmp_path, tokenizer_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content)
    message = fails(settings(tmp_path, paths=[str(path)], tokenizer=str(tokenizer_path)))
    for part in [str(path), "data.paths", *expected]:
        assert part in message, message


def test_unreadable_parquet_is_named(tmp_path, tokenizer_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "text": [3, 4]}), path)
    config = settings(tmp_path, paths=[str(path)], tokenizer=str(tokenizer_path))
    assert f"{path} (data.paths): row 1 holds int, not text" in fails(config)
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2]}), path)
    assert "it has id" in fails(config)
    os.truncate(path, path.stat().st_size // 2)
    assert f"{path}: broken parquet file" in fails(config)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_forbidden_file_is_named(tmp_path, monkeypatch, name):
    tmp_path.chmod(0o755)
    (tmp_path / name).write_text('{"text": "x"}')
    (tmp_path / name).chmod(0)
    monkeypatch.chdir(tmp_path)
    corpus = find_corpus([name], "text", "data.paths")
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # root may read anything
        with pytest.raises(ConfigError, match=f"data.paths: {name}: cannot be read: Permission denied"):
            corpus.fingerprint(tmp_path)
        with pytest.raises(ConfigError, match=f"data.paths: {name}: cannot be read: .*[Pp]ermission"):
            list(corpus.documents())
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("key", ["paths", "valid_paths"])
def test_missing_and_empty_paths_are_named(tmp_path, folder, tokenizer_path, key):
    def message(path: Path) -> str:
        return fails(settings(tmp_path, **{"paths": [str(folder)], key: [str(path)]}, tokenizer=str(tokenizer_path)))

    missing, empty, blank = tmp_path / "missing", tmp_path / "empty", tmp_path / "blank.jsonl"
    empty.mkdir()
    blank.touch()
    assert f"data.{key}: {missing}: no such file or folder" in message(missing)
    assert f"data.{key}: {empty}: the folder holds no files" in message(empty)
    assert f"data.{key}: no documents in 1 files" in message(blank)


def test_empty_corpus_is_named_before_a_tokenizer_is_trained(tmp_path):
    (tmp_path / "blank.jsonl").touch()
    assert "data.paths: no documents" in fails(settings(tmp_path, paths=[str(tmp_path / "blank.jsonl")]))


@pytest.mark.parametrize("key", ["paths", "valid_paths"])
def test_short_documents_are_named(tmp_path, folder, tokenizer_path, key):
    path = tmp_path / "short.txt"
    path.write_text("ab")
    message = fails(
        settings(tmp_path, **{"paths": [str(folder)], key: [str(path)]}, tokenizer=str(tokenizer_path), add_bos=True)
    )
    assert f"data.{key}: no document is long enough: the longest has 3 tokens, a row needs 64" in message
    assert "lower data.min_length" in message


def test_bad_tokenizers_are_named(tmp_path, folder, tokenizer_path):
    path = tmp_path / "t.json"
    base = {"paths": [str(folder)], "tokenizer": str(path)}
    assert f"data.tokenizer: {path}: no such file" in fails(settings(tmp_path, **base))
    path.write_bytes(tokenizer_path.read_bytes()[:-20])
    assert f"data.tokenizer: {path}: no valid tokenizer.json" in fails(settings(tmp_path, **base))
    shutil.copy(tokenizer_path, path)
    message = fails(settings(tmp_path, vocab_size=VOCAB - 1, **base))
    assert "ids up to 299" in message and "set model.vocab_size=300 or more" in message
    Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")).save(str(path))
    message = fails(settings(tmp_path, add_bos=True, **base))
    assert f"data.add_bos=true: {path} has none of the tokens <bos>, <s>" in message


def test_vocabularies_that_cannot_be_trained_are_named(tmp_path, folder):
    assert "model.vocab_size=257: a byte-level BPE needs 258" in fails(settings(tmp_path, 257, paths=[str(folder)]))
    message = fails(settings(tmp_path, 5000, paths=[str(folder)]))
    size = int(message.split("a vocabulary of ")[1].split()[0])
    assert message.startswith("model.vocab_size=5000: ") and f"lower it to {size}" in message
    assert len(prepare(settings(tmp_path, size, paths=[str(folder)])).train)  # the remedy helps


def test_token_id_beyond_the_vocabulary_is_named(tmp_path):
    ids = np.array([5, 41, 7])
    pack([("train", ids), ("valid", ids)], tmp_path, RowRule(8, 2, False, None), 300, "f")
    assert len(Rows(tmp_path / "train", 42)) == 1
    with pytest.raises(ConfigError, match=r"train\.bin: holds token id 41, model\.vocab_size=41 allows 40"):
        Rows(tmp_path / "train", 41)


def test_cache_folder_that_cannot_be_written_is_named(tmp_path, folder, tokenizer_path):
    (tmp_path / "cache").write_text("a file stands in the way")
    config = settings(tmp_path, paths=[str(folder)], tokenizer=str(tokenizer_path))
    with pytest.raises(ConfigError, match=f"data.cache_dir={tmp_path}/cache: "):
        prepare(config)


# Order


def test_each_epoch_is_a_permutation():
    stream = sample_rows(1, 0, 3 * 50, 50).reshape(3, 50)
    for epoch in stream:
        assert sorted(epoch) == list(range(50))
    assert len({tuple(epoch) for epoch in stream}) == 3
    assert stream.dtype == np.int64


def test_samples_do_not_depend_on_where_one_starts():
    whole = sample_rows(7, 0, 101, 10)
    for size in (1, 3, 7, 10, 23):
        pieces = [sample_rows(7, first, min(size, 101 - first), 10) for first in range(0, 101, size)]
        assert np.array_equal(np.concatenate(pieces), whole)
    assert np.array_equal(sample_rows(7, 8, 4, 10), whole[8:12])  # across the edge of an epoch
    assert sample_rows(7, 8, 0, 10).shape == (0,)


def test_set_smaller_than_a_batch():
    rows = sample_rows(3, 0, 8, 3)
    assert sorted(rows[:3]) == sorted(rows[3:6]) == [0, 1, 2] and set(rows[6:]) < {0, 1, 2}
    assert sample_rows(3, 5, 4, 1).tolist() == [0, 0, 0, 0]


def test_order_follows_the_seed():
    orders = {tuple(sample_rows(seed, 0, 100, 100)) for seed in range(20)}
    assert len(orders) == 20
    assert sample_rows(1, 0, 8, 8).tolist() == [4, 0, 6, 3, 5, 7, 2, 1]  # for ever: checkpoints resume by it


# Command line


def test_command_line_prints_the_counts(tmp_path, monkeypatch, capsys, folder, tokenizer_path):
    path = Path(__file__).parents[1] / "tools" / "prepare_data.py"
    spec = importlib.util.spec_from_file_location("prepare_data", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setitem(sys.modules, "megatron_refine.models.family", type("family", (), {"FAMILIES": {"stub": Stub}}))
    settings(tmp_path, paths=[str(folder)], tokenizer=str(tokenizer_path))
    assert tool.main(["--config", str(tmp_path / "config.yaml"), "data.min_length=40"]) == 0
    shown = capsys.readouterr().out
    assert str(tokenizer_path) in shown and "train  documents" in shown and shown.count(".bin") == 2
    assert tool.main(["--config", str(tmp_path / "config.yaml"), "data.paths=[/missing]"]) == 2
    assert "data.paths: /missing: no such file or folder" in capsys.readouterr().err
