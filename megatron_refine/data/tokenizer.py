"""The tokenizer: a tokenizer.json or tokenizer.model of the user's, or a byte-level BPE trained on the corpus."""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_refine.config import ConfigError
from megatron_refine.data.formats import refusal, shown
from megatron_refine.data.sentencepiece_model import SentencePieceModel
from megatron_refine.data.special_tokens import KEPT, OWN, SpecialTokens, find_special_tokens
from megatron_refine.files import copy, write, write_json

BOS, EOS = "<bos>", "<eos>"
FILES = ("tokenizer.json", "tokenizer.model")  # what a model's folder calls it, the preferred one first
_BOS_NAMES = (BOS, "<s>", "<|begin_of_text|>", "<|bos|>", "[BOS]")  # what published tokenizers call it
_EOS_NAMES = (EOS, "</s>", "<|end_of_text|>", "<|endoftext|>", "<|eos|>", "[EOS]")
_PAD_NAMES = ("<pad>", "<|pad|>", "[PAD]")
_SMALLEST_BPE = 256 + 2  # every byte, BOS and EOS
_BATCH_CHARS = 1 << 20  # text encoded at once: bounds memory, keeps the threads busy


class Tokenizer(Protocol):
    """A tokenizer. Text never becomes a special token: "<s>" in a document is three characters."""

    largest_id: int
    special: SpecialTokens  # as they are declared, and where
    bos_id: int | None  # None: it has no such token
    eos_id: int | None  # what training appends to an answer
    pad_id: int | None
    ends: tuple[int, ...]  # each of them ends an answer

    def token_id(self, token: str) -> int | None:
        """Return the id of a token by its name, None where there is none."""

    def token(self, number: int) -> str:
        """The name of an id."""

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, without special tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens included."""


class JsonTokenizer:
    """The tokenizer of a tokenizer.json, as the `tokenizers` library reads it."""

    special: SpecialTokens
    ends: tuple[int, ...]

    def __init__(self, path: Path, key: str) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            reason = " ".join(str(error).split())
            raise refusal(path, key, f"is not a valid tokenizer.json: {reason}; replace or delete it") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.largest_id: int = max(self._tokenizer.get_vocab().values(), default=-1)
        self.bos_id, self.eos_id, self.pad_id = map(self._find, (_BOS_NAMES, _EOS_NAMES, _PAD_NAMES))

    def token_id(self, token: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def token(self, number: int) -> str:
        return str(self._tokenizer.id_to_token(number))

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _find(self, names: Sequence[str]) -> int | None:
        return next((token for token in map(self.token_id, names) if token is not None), None)


def find_tokenizer(path: Path, key: str) -> Path:
    """Return `path`, or the tokenizer.json or else tokenizer.model of a folder. Raises ConfigError without any."""
    if path.is_dir():
        for name in FILES:
            if (path / name).is_file():
                return path / name
        raise refusal(path, key, f"has neither {' nor '.join(FILES)}; name a tokenizer's file")
    if not path.is_file():
        what = f"no such file; name a {', a '.join(FILES)} or their folder, or leave it empty to train one"
        raise refusal(path, key, what)
    return path


def load_tokenizer(path: Path, vocab_size: int, key: str) -> Tokenizer:
    """Read the tokenizer at `path`, a file or a folder: a name in .json as a tokenizer.json, others as sentencepiece's.

    Its special tokens are the declared ones (special_tokens.py). Raises ConfigError where it is missing, damaged or
    knows ids >= vocab_size, and where it lacks a declared token.
    """
    path = find_tokenizer(path, key)
    tokenizer = _read(path, key)
    largest = max(tokenizer.largest_id, *(i for i in (tokenizer.bos_id, *tokenizer.ends) if i is not None), -1)
    if largest >= vocab_size:
        raise ConfigError(
            f"{key}: {path}: has token ids up to {largest}, but model.vocab_size={vocab_size} allows {vocab_size - 1} "
            f"at most; set model.vocab_size={largest + 1} or more"
        )
    return tokenizer


def stated(path: Path, tokenizer: Tokenizer) -> str:
    """Say in a line which tokenizer is taken, and which special tokens from which file."""
    return f"tokenizer {shown(path)}: {tokenizer.special}"


def keep_tokenizer(path: Path, tokenizer: Tokenizer, folder: Path) -> None:
    """Copy a tokenizer into a run's folder, which then has all that an evaluation of its checkpoints needs.

    The files that declare its special tokens stay behind: what they say is written down. Raises OSError.
    """
    if set(tokenizer.special.origin.values()) != {OWN}:
        write_json(folder / KEPT, tokenizer.special.to_json())
    else:
        (folder / KEPT).unlink(missing_ok=True)
    name, other = FILES if _is_json(path) else FILES[::-1]
    copy(path, folder / name)
    (folder / other).unlink(missing_ok=True)  # of an earlier attempt, which had another tokenizer


def check_vocabulary(vocab_size: int) -> None:
    """Raise ConfigError where no byte-level BPE can be that small."""
    if vocab_size < _SMALLEST_BPE:
        raise ConfigError(f"model.vocab_size={vocab_size}: a byte-level BPE needs {_SMALLEST_BPE} or more; raise it")


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Train a byte-level BPE of exactly `vocab_size` ids and write it to `path`. The same texts give the same bytes.

    Raises ConfigError where model.vocab_size is too small, or too large for the text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    check_vocabulary(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(iter(texts), trainer)
    size = tokenizer.get_vocab_size()
    if size < vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size}: the corpus gives a vocabulary of {size} only; lower it to {size}, "
            "name more text in data.paths, or name a data.tokenizer"
        )
    write(path, tokenizer.to_str(pretty=True))


def bos_id(tokenizer: Tokenizer, path: Path) -> int:
    """Return the id of the BOS token. Raises ConfigError where the vocabulary has none."""
    if tokenizer.bos_id is not None:
        return tokenizer.bos_id
    names = f"has none of the tokens {', '.join(_BOS_NAMES)}" if _is_json(path) else "has no BOS piece"
    if (says := tokenizer.special.origin["bos"]) != OWN:
        names = f"has no BOS token, says {says} beside it"
    raise ConfigError(f"data.add_bos=true: {path} {names}; set data.add_bos=false")


def encode_all(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each text with its token ids ([length] int64, no special tokens), in order."""
    for batch in _batches(texts):
        for text, ids in zip(batch, tokenizer.encode(batch), strict=True):
            yield text, np.array(ids, np.int64)


def decode(tokenizer_path: Path | str, ids: Sequence[int] | np.ndarray) -> str:
    """Return the text of token ids, special tokens included."""
    path = Path(tokenizer_path)
    return _read_once(path, path.stat().st_mtime_ns).decode([int(i) for i in ids])


def _is_json(path: Path) -> bool:
    return path.suffix == ".json"


def _read(path: Path, key: str) -> Tokenizer:
    found = JsonTokenizer(path, key) if _is_json(path) else SentencePieceModel(path, key)
    special = found.special = find_special_tokens(path, found, key)
    found.bos_id, found.eos_id, found.pad_id, found.ends = special.bos, special.eos, special.pad, special.ends
    return found


@lru_cache(maxsize=1)
def _read_once(path: Path, changed: int) -> Tokenizer:
    """Read a tokenizer as it was at `changed`. Many short texts are decoded in a row, faster than it is read."""
    return _read(path, "data.tokenizer")


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    chars = 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch
