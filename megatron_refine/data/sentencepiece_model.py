"""A sentencepiece tokenizer.model, read by the sentencepiece library itself.

A conversion to BPE merges gives the same ids for some models only (not for unigram ones, not where the model normalizes
text), and is no faster.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_refine.config import ConfigError
from megatron_refine.data.special_tokens import SpecialTokens

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

# Fields of sentencepiece's ModelProto. Where a file ends before them the library takes defaults: it would normalize
# text in another way, without a word.
_REQUIRED = {1: "pieces", 2: "trainer_spec", 3: "normalizer_spec"}
_LENGTH_DELIMITED = 2  # the wire type of all fields of a ModelProto


class SentencePieceModel:
    """The tokenizer of a tokenizer.model: its pieces, scores, normalization and spaces as it was trained with."""

    special: SpecialTokens
    ends: tuple[int, ...]

    def __init__(self, path: Path, key: str) -> None:
        """Read the model. Raises ConfigError, beginning with `key`, where it is damaged or the library is missing."""
        self._model = _load(path, key)
        self.largest_id: int = self._model.vocab_size() - 1
        own = (self._model.bos_id(), self._model.eos_id(), self._model.pad_id())
        self.bos_id, self.eos_id, self.pad_id = (i if i >= 0 else None for i in own)

    def token_id(self, token: str) -> int | None:
        """Return the id of a piece by its name, None where there is none."""
        found: int = self._model.piece_to_id(token)
        return found if self._model.id_to_piece(found) == token else None  # of an unknown name: that of <unk>

    def token(self, number: int) -> str:
        """The name of an id."""
        return str(self._model.id_to_piece(number))

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text. Control pieces never come from text: "<s>" in a document is three characters.

        (Pieces that a model declares as user-defined do: they are found in text before all others.)
        """
        return self._model.encode(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids: what was encoded, but "▁" (U+2581) becomes the space that it stands for in pieces.

        Control pieces show by their names. Ids that the model does not have, which a padded vocabulary allows to be
        sampled, show as its unknown piece does.
        """
        model = self._model
        known = [i if 0 <= i <= self.largest_id else model.unk_id() for i in ids]
        runs = [(control, list(run)) for control, run in groupby(known, model.is_control)]
        return "".join("".join(map(model.id_to_piece, run)) if control else model.decode(run) for control, run in runs)


def _load(path: Path, key: str) -> "SentencePieceProcessor":
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise ConfigError(
            f"{key}: {path}: is read by the package sentencepiece, which is missing: pip install sentencepiece"
        ) from None
    try:
        data = path.read_bytes()
        present = set(_fields(data))
        missing = [name for field, name in _REQUIRED.items() if field not in present]
        if missing:
            raise ValueError(f"it has no {' and no '.join(missing)}")
        return SentencePieceProcessor(model_proto=data)
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ConfigError(
            f"{key}: {path}: is not a valid sentencepiece model: {reason}; fetch it again, or name a tokenizer.json "
            "(known by its name's .json)"
        ) from None


def _fields(data: bytes) -> Iterator[int]:
    """Yield the numbers of a serialized ModelProto's fields. Raises ValueError where it is another file or ends early.

    Source: the protocol buffers wire format. A field is its number and wire type, its length, its content.
    """
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        length, at = _varint(data, at)
        if tag & 7 != _LENGTH_DELIMITED:
            raise ValueError("it is another kind of file")
        at += length
        if at > len(data):
            raise ValueError("it ends early, or is another kind of file")
        yield tag >> 3


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number that begins at `at`, and where it ends.

    It has 7 bits a byte, the lowest first; the top bit of its last byte is not set.
    """
    value = shift = 0
    for end in range(at, min(at + 10, len(data))):
        value |= (data[end] & 0x7F) << shift
        shift += 7
        if data[end] < 0x80:
            return value, end + 1
    raise ValueError("it ends early, or is another kind of file")
