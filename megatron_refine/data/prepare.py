"""From the configuration to packed rows: done once, found again by fingerprint."""

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_refine.config import Config, ConfigError
from megatron_refine.data.corpus import Corpus, find_corpus
from megatron_refine.data.packed import PackedRows
from megatron_refine.data.packing import SIDES, Record, RowRule, pack
from megatron_refine.data.split import adjusted_threshold, cut_in_two, share, threshold_of
from megatron_refine.data.tokenizer import (
    Tokenizer,
    bos_id,
    encode_all,
    find_tokenizer,
    load_tokenizer,
    stated,
    train_tokenizer,
)
from megatron_refine.errors import FULL
from megatron_refine.files import digest, temporary
from megatron_refine.progress import counted

_FORMAT = 1  # raise it when the same configuration gives other tokens or files
_HELD_OUT_FORMAT = 2  # the same, of documents that are held out by a rule of their own


@dataclass(frozen=True)
class Prepared:
    """Data ready for training."""

    train: PackedRows
    valid: PackedRows
    tokenizer: Path

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Documents read, documents dropped as too short, rows, and tokens in the rows, of each side."""
        keys = ("documents", "dropped", "rows", "tokens")
        return {side: {key: getattr(getattr(self, side).record, key) for key in keys} for side in SIDES}


@dataclass(frozen=True)
class _Sources:
    """The documents of a configuration and how they divide into the two sides."""

    train: Corpus
    valid: Corpus | None  # None: documents of `train` whose share is below the threshold are held out
    threshold: int

    def sided(self, tokenizer: Tokenizer, threshold: int) -> Iterator[tuple[str, np.ndarray]]:
        """Yield every document as (side, token ids [length])."""
        for text, ids in encode_all(tokenizer, _progress(self.train)):
            yield "valid" if share(text) < threshold else "train", ids
        for _, ids in encode_all(tokenizer, _progress(self.valid) if self.valid else ()):
            yield "valid", ids

    def identity(self, cache_dir: Path) -> list[str | int | None]:
        """Return what decides the rows: the fingerprints of the corpora and the threshold."""
        valid = self.valid.fingerprint(cache_dir) if self.valid else None
        return [self.train.fingerprint(cache_dir), valid, self.threshold]


def prepare(config: Config, say: Callable[[str], None] = lambda _: None) -> Prepared:
    """Return the packed rows of `config.data`, written to data.cache_dir unless they are there already.

    `say` is told which files are read and which special tokens are taken, a line each. Several processes may prepare
    the same data at once. Raises ConfigError for any input that cannot be used, OSError for a full disk.
    """
    data, cache_dir = config.data, Path(config.data.cache_dir)
    sources = _find_sources(config)
    for corpus in filter(None, (sources.train, sources.valid)):
        say(corpus.summary)
    try:
        identity = sources.identity(cache_dir)
        trained_on = _hash([*identity[:1], *identity[2:], data.text_column])
        path, tokenizer = _get_tokenizer(config, sources, trained_on, say)
        say(stated(path, tokenizer))
        rule = RowRule.of(data, bos_id(tokenizer, path) if data.add_bos else None)
        rules = {"train": rule, "valid": rule.held_out(data)}
        own: list[object] = [vars(rules["valid"])] if rules["valid"] != rule else []
        own += [_HELD_OUT_FORMAT] if own and not sources.valid else []
        fingerprint = _hash([_FORMAT, identity, digest(path), vars(rule), data.text_column, *own])
        folder = cache_dir / f"rows-{fingerprint[:16]}"
        if not folder.exists():
            say(f"tokenizing {len(sources.train.files) + len(sources.valid.files if sources.valid else ()):,} files")
            _write_folder(folder, sources, tokenizer, rules, config.model.vocab_size, fingerprint, data.valid_fraction)
    except OSError as error:  # the corpus' own failures are ConfigErrors already
        if error.errno in FULL:
            raise OSError(error.errno, error.strerror, f"data.cache_dir={cache_dir}") from None
        raise ConfigError(f"data.cache_dir={cache_dir}: {error.strerror}; name another folder") from None
    train, valid = (PackedRows(folder / side, config.model.vocab_size) for side in SIDES)
    if valid.record.note:
        say(valid.record.note)
    return Prepared(train, valid, path)


def _find_sources(config: Config) -> _Sources:
    data = config.data
    train = find_corpus(data.paths, data.text_column, "data.paths")
    if not data.valid_paths:
        return _Sources(train, None, threshold_of(data.valid_fraction))
    return _Sources(train, find_corpus(data.valid_paths, data.text_column, "data.valid_paths"), 0)


def _get_tokenizer(
    config: Config, sources: _Sources, identity: str, say: Callable[[str], None]
) -> tuple[Path, Tokenizer]:  # fmt: skip
    """The configured tokenizer, or the one trained on this corpus, with its path."""
    data, vocab_size = config.data, config.model.vocab_size
    if data.tokenizer:
        path = find_tokenizer(Path(data.tokenizer), "data.tokenizer")
    else:
        path = Path(data.cache_dir, f"tokenizer-{vocab_size}-{identity[:16]}.json")
        if not path.exists():
            say(f"training a tokenizer of {vocab_size:,} ids")
            train_tokenizer(_training_texts(sources), vocab_size, path)
    return path, load_tokenizer(path, vocab_size, "data.tokenizer")


def _training_texts(sources: _Sources) -> Iterable[str]:
    """Return the documents that are not held out; all of them where that would leave none."""
    empty = True
    for text in sources.train.documents():
        if share(text) >= sources.threshold:
            return (text for text in sources.train.documents() if share(text) >= sources.threshold)
        empty = False
    if empty:
        raise _no_documents(sources.train)
    return sources.train.documents()


def _write_folder(
    folder: Path, sources: _Sources, tokenizer: Tokenizer, rules: dict[str, RowRule], vocab_size: int,
    fingerprint: str, fraction: float,
) -> None:  # fmt: skip
    """Pack into a folder of our own, then rename it: `folder` is absent or complete."""
    unfinished, rule = temporary(folder), rules["train"]
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        records = pack(sources.sided(tokenizer, sources.threshold), unfinished, rules, vocab_size, fingerprint)
        _check_lengths(sources, records, rules)
        if not all(records[side].rows for side in SIDES):
            # A small corpus may have all its long documents on one side, or one alone. (Its trained tokenizer has then
            # seen what changes sides.)
            documents = functools.partial(encode_all, tokenizer)
            threshold = adjusted_threshold(documents(sources.train.documents()), rules, sources.threshold)
            if threshold is not None:
                pack(sources.sided(tokenizer, threshold), unfinished, rules, vocab_size, fingerprint)
            elif rules["valid"].min_length > rule.min_length:
                raise ConfigError(
                    f"data.valid_min_length={rules['valid'].min_length}: no document is left to train on when one of "
                    "that length is held out; lower it, or name data.valid_paths"
                )
            else:
                parts, note = cut_in_two(documents(sources.train.documents()), rule, fraction)
                pack(parts, unfinished, dict.fromkeys(SIDES, rule.splitting), vocab_size, fingerprint, note)
        unfinished.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        # else another process was first: its rows are the same
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _check_lengths(sources: _Sources, records: dict[str, Record], rules: dict[str, RowRule]) -> None:
    """Raise ConfigError where a corpus has no documents, or none long enough."""
    corpora = [(sources.train, [*records.values()], rules["train"], "min_length")]
    if sources.valid:
        own = "min_length" if rules["valid"] == rules["train"] else "valid_min_length"
        corpora = [
            (sources.train, [records["train"]], rules["train"], "min_length"),
            (sources.valid, [records["valid"]], rules["valid"], own),
        ]
    for corpus, parts, rule, key in corpora:
        if not any(part.documents for part in parts):
            raise _no_documents(corpus)
        if not any(part.rows for part in parts):
            longest = max(part.longest for part in parts)
            raise ConfigError(
                f"{corpus.key}: no document is long enough: the longest has {longest} tokens, a row needs "
                f"{rule.min_length}; lower data.{key} (0: data.seq_length={rule.seq_length}) or name longer text"
            )


def _no_documents(corpus: Corpus) -> ConfigError:
    return ConfigError(f"{corpus.key}: no documents in {len(corpus.files)} files; name files that hold text")


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _progress(corpus: Corpus) -> Iterable[str]:
    """Yield the documents of a corpus, and show how far it is."""
    return counted(corpus.documents(), f"tokenizing {corpus.key}", corpus.num_documents, "documents")
