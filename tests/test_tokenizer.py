"""Sentencepiece models and models' folders: ids against a reference and the library, text back, damage, whole runs."""

import argparse
import hashlib
import io
import json
import os
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from megatron_refine.config import Config, ConfigError, Data
from megatron_refine.data.corpus import find_corpus
from megatron_refine.data.prepare import prepare
from megatron_refine.data.tokenizer import bos_id, decode, encode_all, load_tokenizer, train_tokenizer
from tests import runs
from tests.conversions import convert, hf_folder, to_megatron
from tests.parity import small_config

MISTRAL = Path(__file__).parent / "golden" / "mistral_v1" / "tokenizer.model"
CODE = Path(textwrap.__file__).read_text(encoding="utf-8")
PROSE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
TABBED = CODE.replace("        ", "\t\t").replace("\n", "\r\n", 40)
TEXTS = [
    "", " ", "  ", "\n", "\t", "\n\n\n    x", "Hello world!", " lead", "trail ", "  two  and   three    spaces",
    "x\n    return", "def f(x):\n\treturn  x**2  # code\n\n", "a\r\nb\rc", "naïve café, Ünïcödé", "日本語の文章。",
    "🙂👩‍👩‍👧 \U000e0001", "\x00\x01\ufeff\ufffd", "ﬁ ａ Å", "<s> and </s> and <unk> and <0x0A>", "[INST] x [/INST]",
]  # fmt: skip


def ids_of(path: Path, texts: list[str], vocab_size: int = 1 << 20) -> list[list[int]]:
    return [ids.tolist() for _, ids in encode_all(load_tokenizer(path, vocab_size, "data.tokenizer"), texts)]


def trained(path: Path, **options: Any) -> Path:
    """A sentencepiece model of 400 pieces of argparse.py."""
    written = io.BytesIO()
    lines = iter(Path(argparse.__file__).read_text(encoding="utf-8").splitlines())
    defaults = {"vocab_size": 400, "model_type": "unigram", "minloglevel": 2, "num_threads": 1}
    SentencePieceTrainer.train(sentence_iterator=lines, model_writer=written, **defaults | options)
    path.write_bytes(written.getvalue())
    return path


@pytest.fixture(scope="module")
def unigram(tmp_path_factory: Any) -> Path:
    """Of a kind that no conversion to merges can hold: unigram, NFKC and spaces collapsed, no bytes, no BOS."""
    return trained(tmp_path_factory.mktemp("unigram") / "tokenizer.model", bos_id=-1)


def config_of(tmp_path: Path, tokenizer: Path, vocab_size: int, **data: Any) -> Config:
    config = small_config(tmp_path)
    own = {"paths": [argparse.__file__], "valid_paths": [textwrap.__file__], "seq_length": 64, "split_documents": True}
    section = Data(**own | {"cache_dir": str(tmp_path / "cache"), "tokenizer": str(tokenizer)} | data)
    model = config.model.model_copy(update={"vocab_size": vocab_size})
    return config.model_copy(update={"data": section, "model": model})


def failure(path: Path, vocab_size: int = 1 << 20) -> str:
    """The one line with which loading fails."""
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(path, vocab_size, "data.tokenizer")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("data.tokenizer: ")
    return str(caught.value)


# Ids
def merged(model: SentencePieceProcessor, text: str) -> list[int]:
    """Slow reference of a BPE model that normalizes nothing: of all neighbours that make a piece the best score merges,
    the leftmost of equals, until none is left; characters without a piece become bytes. (Kudo, Richardson 2018)"""
    scores = {model.id_to_piece(i): model.get_score(i) for i in range(model.vocab_size()) if not model.is_control(i)}
    parts = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in scores]
        if not pairs:
            break
        at = -max(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    pieces = [[p] if p in scores else [f"<0x{byte:02X}>" for byte in p.encode()] for p in parts]
    return [model.piece_to_id(piece) for run in pieces for piece in run]


def test_ids_are_those_of_the_slow_reference() -> None:
    model = SentencePieceProcessor(model_file=str(MISTRAL))
    texts = [*TEXTS, CODE[:1200], TABBED[4000:5000], PROSE[:1000]]
    for text, ids in zip(texts, ids_of(MISTRAL, texts), strict=True):
        assert ids == merged(model, text), repr(text)


@pytest.mark.parametrize(("text", "ids"), [
    ("Hello world!", [22557, 1526, 28808]),
    ("x\n    return", [1318, 13, 2287, 604]),
    ("", []), (" ", [259]), ("  ", [2287]), ("\n", [28705, 13]), ("a\x00b", [264, 3, 28726]),
    ("<s> x </s><unk>", [523, 28713, 28767, 1318, 1867, 28713, 3409, 2060, 28767]),
    ("ﬁ ａ", [28705, 30160, 28705, 242, 192, 132]),
    ("🙂é日本", [28705, 29340, 28797, 29142, 29119]),
])  # fmt: skip
def test_ids_stay_what_the_released_models_were_trained_on(text: str, ids: list[int]) -> None:
    assert ids_of(MISTRAL, [text]) == [ids]


def test_the_vocabulary_is_the_published_one() -> None:
    published = "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"
    assert hashlib.sha256(MISTRAL.read_bytes()).hexdigest() == published
    tokenizer = load_tokenizer(MISTRAL, 32000, "data.tokenizer")
    assert tokenizer.largest_id == 31999 and bos_id(tokenizer, MISTRAL) == 1


@pytest.mark.parametrize("kind", ["mistral", "unigram", "word", "no prefix"])
def test_ids_are_the_library_s_whatever_the_model(tmp_path: Path, unigram: Path, kind: str) -> None:
    path = {"mistral": MISTRAL, "unigram": unigram}.get(kind, tmp_path / "m.model")
    if kind == "word":
        trained(path, model_type="word", user_defined_symbols=["<|sep|>"], hard_vocab_limit=False)
    elif kind == "no prefix":
        trained(path, model_type="bpe", add_dummy_prefix=False, treat_whitespace_as_suffix=True, byte_fallback=True,
                vocab_size=600)  # fmt: skip
    texts = [*TEXTS, CODE, TABBED, PROSE, "a<|sep|>b"]
    library = SentencePieceProcessor(model_file=str(path))
    assert ids_of(path, texts) == [library.encode(text) for text in texts]


# Text
@pytest.mark.parametrize("folder", [False, True])
def test_decode_inverts_encode(tmp_path: Path, folder: bool) -> None:
    path = MISTRAL.parent if folder else MISTRAL
    texts = [*TEXTS, CODE, TABBED, PROSE]
    for text, ids in zip(texts, ids_of(path, texts), strict=True):
        assert decode(MISTRAL, ids) == text
        assert min(ids, default=3) >= 3  # text never becomes <unk>, <s> or </s>
    assert decode(MISTRAL, ids_of(MISTRAL, ["▁a▁"])[0]) == " a "  # the one exception


def test_no_prefix_no_space_is_taken(tmp_path: Path) -> None:
    """Models differ in the space that they put before a text, and take from it."""
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    path = trained(tmp_path / "m.model", model_type="bpe", add_dummy_prefix=False, vocab_size=600, **options)
    for text, ids in zip(TEXTS, ids_of(path, TEXTS), strict=True):
        assert decode(path, ids) == text


def test_special_pieces_and_foreign_ids_are_shown() -> None:
    (first, second) = ids_of(MISTRAL, [" one", "two"])
    assert decode(MISTRAL, [1, *first, 2, 1, *second]) == "<s> one</s><s>two"
    assert decode(MISTRAL, np.array([1])) == "<s>" and decode(MISTRAL, []) == ""
    assert decode(MISTRAL, [*first, 32000, 0]) == " one ⁇  ⁇ "  # 32000: of a vocabulary padded to 32128, say
    assert decode(MISTRAL, [28705, 29340, 243, 162]) == "🙂\ufffd\ufffd"  # a rollout may end within a character


def test_decode_sees_that_a_file_changed(tmp_path: Path, unigram: Path) -> None:
    path = tmp_path / "tokenizer.model"
    for at, source in enumerate([MISTRAL, unigram]):
        path.write_bytes(source.read_bytes())
        os.utime(path, (at, at))
        assert decode(path, ids_of(source, ["parser"])[0]) == "parser"


# Files
def test_a_folder_s_json_comes_first(tmp_path: Path) -> None:
    assert f"{tmp_path}: has neither tokenizer.json nor tokenizer.model; name a tokenizer" in failure(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(MISTRAL.read_bytes())
    assert ids_of(tmp_path, ["Hello world!"]) == [[22557, 1526, 28808]]
    train_tokenizer([CODE], 300, tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path, 300, "data.tokenizer").largest_id == 299
    assert prepare(config_of(tmp_path, tmp_path, 300)).tokenizer == tmp_path / "tokenizer.json"


@pytest.mark.parametrize("content", [
    b"", b"\n", b"{}", b"\0" * 50, b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 493443\n",
    b"\n\x00\x12\x00\x1a\x00", b"\xff" * 30, b"\n\x03abc\x12\x00\x1a\x00",
], ids=["empty", "newline", "json", "zeros", "pointer", "no unk", "no number", "no piece"])  # fmt: skip
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    message = failure(path)
    assert f"data.tokenizer: {path}: is not a valid sentencepiece model: " in message and "; fetch it again" in message


def test_a_cut_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    whole, path = MISTRAL.read_bytes(), tmp_path / "tokenizer.model"
    silent = SentencePieceProcessor(model_proto=whole[:-20])  # what the library makes of it: spaces collapse
    assert silent.encode("a  b") != SentencePieceProcessor(model_proto=whole).encode("a  b")
    pieces = len(whole) - 20 - 235  # normalizer_spec, trainer_spec
    assert whole[pieces] == 0x12 and whole[-20] == 0x1A
    ends = [*range(len(whole) - 1, len(whole) - 24, -1), pieces + 100, pieces, pieces - 1, pieces // 2, 16, 1, 0]
    for end in ends:
        path.write_bytes(whole[:end])
        message = failure(path)
        assert ("it ends early" in message) == (end not in (len(whole) - 20, pieces, 16, 0)), (end, message)
    path.write_bytes(whole[:pieces])
    assert "it has no trainer_spec and no normalizer_spec" in failure(path)


def test_bad_choices_are_named(tmp_path: Path, unigram: Path, monkeypatch: Any) -> None:
    missing = tmp_path / "tokenizer.model"
    assert f"{missing}: no such file; name a tokenizer.json, a tokenizer.model or their folder" in failure(missing)
    allowed = "but model.vocab_size=31999 allows 31998 at most; set model.vocab_size=32000"
    large = f"{MISTRAL}: has token ids up to 31999, {allowed}"
    assert large in failure(MISTRAL, 31999)
    assert large in failure(MISTRAL.parent, 31999)
    with pytest.raises(ConfigError, match=r"data\.add_bos=true: .*/tokenizer\.model has no BOS piece; set data"):
        prepare(config_of(tmp_path, unigram, 400, add_bos=True))
    named = tmp_path / "tokenizer.json"  # a sentencepiece model under another's name
    named.write_bytes(MISTRAL.read_bytes())
    assert f"{named}: is not a valid tokenizer.json: " in failure(named)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert failure(MISTRAL).endswith("the package sentencepiece, which is missing: pip install sentencepiece")


# Data
def test_rows_are_the_documents_of_a_sentencepiece_model(tmp_path: Path) -> None:
    prepared = prepare(config_of(tmp_path, MISTRAL.parent, 32000, add_bos=True))
    assert prepared.tokenizer == MISTRAL
    expected = SentencePieceProcessor(model_file=str(MISTRAL)).encode(CODE)
    rows = [prepared.valid.row(i).tolist() for i in range(len(prepared.valid))]
    assert rows == [[1, *expected[at : at + 63]] for at in range(0, len(expected) - 62, 63)]
    text = decode(MISTRAL, [token for row in rows for token in row[1:]])
    assert CODE.startswith(text) and len(text) > 0.95 * len(CODE)  # a rest shorter than a row is dropped


def test_the_fingerprint_follows_the_tokenizer_s_content(tmp_path: Path, unigram: Path) -> None:
    same, other = tmp_path / "same", trained(tmp_path / "other.model", seed_sentencepiece_size=2000, bos_id=-1)
    same.mkdir()
    (same / "tokenizer.model").write_bytes(unigram.read_bytes())
    assert other.read_bytes() != unigram.read_bytes()
    paths = (unigram, same, same / "tokenizer.model", other, MISTRAL)
    prints = [prepare(config_of(tmp_path, path, 32000)).train.fingerprint for path in paths]
    assert prints[0] == prints[1] == prints[2] and len(set(prints)) == 3


def test_the_standard_library_both_ways() -> None:
    """All of a real corpus of code: what is prepared reads back letter by letter."""
    texts = [text for text in find_corpus([], "text", "data.paths").documents()][::8]
    assert sum(map(len, texts)) > 500_000
    for text, ids in encode_all(load_tokenizer(MISTRAL, 32000, "data.tokenizer"), texts):
        assert decode(MISTRAL, ids) == text.replace("▁", " ")


# Runs
@pytest.mark.parametrize("both", [False, True])
def test_a_conversion_names_the_model_s_tokenizer(ranks: Any, tmp_path: Path, both: bool) -> None:
    source, megatron = hf_folder(tmp_path / "source"), tmp_path / "megatron"
    (source / "tokenizer.model").write_bytes(MISTRAL.read_bytes())
    if not both:
        (source / "tokenizer.json").unlink()
    end = ranks(1, convert, arguments=to_megatron(source, megatron))[0]
    named = megatron / "hf" / ("tokenizer.json" if both else "tokenizer.model")
    assert f"checkpoint.load={megatron} data.tokenizer={named} and" in end.out
    assert (megatron / "hf" / "tokenizer.model").read_bytes() == MISTRAL.read_bytes()


def test_a_run_with_a_sentencepiece_model(ranks: Any, tmp_path: Path, unigram: Path) -> None:
    data = {"tokenizer": str(unigram.parent), "cache_dir": str(tmp_path / "cache")}
    train = runs.TREE["train"] | {"steps": 1}
    config = runs.write_config(tmp_path, tmp_path / "cache", data=data, train=train, eval={"sequences": 4})
    end = ranks(1, runs.command, arguments=["--config", str(config)], saves=False)[0]
    assert end.code == 0, end.err
    samples = json.loads((tmp_path / "run" / "samples.json").read_text(encoding="utf-8"))
    library = SentencePieceProcessor(model_file=str(unigram))
    text = library.decode(library.encode(CODE))  # spaces collapsed
    truths = [rollout["truth"] for rollout in samples["rollouts"]]
    assert truths and all(truths) and all(truth in text for truth in truths if "⁇" not in truth)
