# ruff: noqa: F811
"""Held-out documents: which they are, and their rows."""

from pathlib import Path

import pytest

from megatron_refine.config import ConfigError
from megatron_refine.data.prepare import prepare
from megatron_refine.data.tokenizer import encode_all, load_tokenizer
from tests.test_data import DOCUMENTS, VOCAB, contents, failure, settings, tokenizer_path, write  # noqa: F401


def test_no_document_stands_on_both_sides(tmp_path, settings):
    prepared = prepare(settings(paths=write(tmp_path / "a", DOCUMENTS * 2), split_documents=True, min_length=8))
    train, valid = ({tuple(row) for row in contents(rows)} for rows in (prepared.train, prepared.valid))
    assert 0 < len(valid) < len(train) and not train & valid


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_each_side_has_a_document(tmp_path, settings, fraction):
    prepared = prepare(settings(tokenizer="", valid_fraction=fraction))
    assert (len(prepared.train), len(prepared.valid)) == ((39, 1) if fraction < 0.5 else (1, 39))


def test_held_out_documents_have_a_least_length_of_their_own(tmp_path, settings):
    texts = [" ".join(["state"] * n) for n in (200, 150, 90, 20, 5)]
    train, valid = write(tmp_path / "a", texts), write(tmp_path / "b", texts)
    lengths = [ids.size for _, ids in encode_all(load_tokenizer(Path(settings().data.tokenizer), VOCAB, "t"), texts)]
    prepared = prepare(settings(paths=train, valid_paths=[str(valid)], valid_min_length=lengths[3]))
    assert [len(row) for row in contents(prepared.train)] == [64] * sum(n >= 64 for n in lengths)
    assert sorted(len(row) for row in contents(prepared.valid)) == sorted(min(n, 64) for n in lengths[:4])
    again = prepare(settings(paths=train, valid_paths=[str(valid)], valid_min_length=64))
    assert contents(again.valid) == contents(again.train)  # as without the key, from another folder than before
    assert "valid_min_length=65: exceeds data.seq_length=64" in bad_config(settings, valid_min_length=65)
    short = write(tmp_path / "c", texts[4:])
    message = failure(settings(paths=train, valid_paths=[str(short)], valid_min_length=lengths[4] + 1))
    assert f"the longest has {lengths[4]} tokens, a row needs {lengths[4] + 1}; lower data.valid_min_length" in message


def bad_config(settings, **data) -> str:
    with pytest.raises(ConfigError) as caught:
        settings(**data)
    return str(caught.value)


def test_the_side_of_a_document_follows_the_rule_of_that_side(tmp_path, settings):
    """Where what is held out must be longer than what is trained on."""
    texts = [" ".join(["state"] * n) + f" {n}" for n in (200, 190, 30, 28, 26, 24, 22)]
    own = {"min_length": 8, "valid_min_length": 64, "valid_fraction": 1e-9}
    prepared = prepare(settings(paths=write(tmp_path / "a", texts), **own))
    assert len(prepared.valid) == 1 and len(prepared.valid.row(0)) == 64 and len(prepared.train)
    message = failure(settings(paths=write(tmp_path / "b", texts[2:]), **own))
    assert message.startswith("data.valid_min_length=64: no document is left to train on")
    alone = prepare(settings(paths=write(tmp_path / "c", texts[:1]), min_length=32, valid_min_length=8))
    assert len(alone.train) and len(alone.valid) and "cut into rows" in alone.valid.record.note
