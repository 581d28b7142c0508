"""The tokenizer: a tokenizer.json of the user's, or a byte-level BPE trained on the corpus."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_refine.config import ConfigError
from megatron_refine.data.files import write_atomically

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BOS, EOS = "<bos>", "<eos>"
_BOS_NAMES = (BOS, "<s>", "<|begin_of_text|>", "<|bos|>", "[BOS]")  # what published tokenizers call it
_SMALLEST_BPE = 256 + 2  # every byte, BOS and EOS
_BATCH_CHARS = 1 << 20  # text encoded at once: bounds memory, keeps the threads busy


def load_tokenizer(path: Path, vocab_size: int, key: str) -> "Tokenizer":
    """The tokenizer at `path`. Raises ConfigError where it is missing, damaged or knows ids >= vocab_size."""
    from tokenizers import Tokenizer

    if not path.is_file():
        raise ConfigError(f"{key}: {path}: no such file; name a tokenizer.json, or leave it empty to train one")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise ConfigError(f"{key}: {path}: no valid tokenizer.json: {error}; replace or delete it") from None
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        raise ConfigError(
            f"{key}: {path}: has token ids up to {largest}, model.vocab_size={vocab_size} allows {vocab_size - 1}; "
            f"set model.vocab_size={largest + 1} or more"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "<bos>" in a document is five characters, not the token
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Train a byte-level BPE of exactly `vocab_size` ids and write it to `path`. The same texts give the same bytes.

    Raises ConfigError where model.vocab_size is too small, or too large for the text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < _SMALLEST_BPE:
        raise ConfigError(f"model.vocab_size={vocab_size}: a byte-level BPE needs {_SMALLEST_BPE} or more; raise it")
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
    write_atomically(path, tokenizer.to_str(pretty=True))


def bos_id(tokenizer: "Tokenizer", path: Path) -> int:
    """The id of the BOS token. Raises ConfigError where the vocabulary has none."""
    for name in _BOS_NAMES:
        token = tokenizer.token_to_id(name)
        if token is not None:
            return token
    names = ", ".join(_BOS_NAMES)
    raise ConfigError(f"data.add_bos=true: {path} has none of the tokens {names}; set data.add_bos=false")


def encode_all(tokenizer: "Tokenizer", texts: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Each text with its token ids ([length] int64, no special tokens), in order."""
    for batch in _batches(texts):
        encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        for text, encoding in zip(batch, encodings, strict=True):
            yield text, np.array(encoding.ids, np.int64)


def decode(tokenizer_path: Path | str, ids: Sequence[int] | np.ndarray) -> str:
    """The text of token ids, special tokens included."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(tokenizer_path)).decode([int(i) for i in ids], skip_special_tokens=False)


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
