"""Held-out documents: their text alone decides, so that equal documents never stand on both sides."""

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np

from megatron_refine.config import ConfigError
from megatron_refine.data.packing import RowRule

_WHOLE = 1 << 64


def share(text: str) -> int:
    """Return a document's place in [0, 2^64), uniform over documents. Below the threshold it is held out."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8], "big")


def threshold_of(fraction: float) -> int:
    """Return the threshold that holds out `fraction` of the documents."""
    return int(fraction * _WHOLE)


def adjusted_threshold(
    documents: Iterable[tuple[str, np.ndarray]], rules: Mapping[str, RowRule], threshold: int
) -> int | None:
    """Return the threshold nearest to `threshold` that leaves a document that gives rows on each side, by its rule.

    documents: texts with their token ids [length]. Returns None where none does: one document alone may give rows.
    """
    highest, lowest = -1, _WHOLE  # shares of what gives rows for training, and of what does when held out
    for text, ids in documents:
        place = share(text)
        highest = max(highest, place) if rules["train"].rows(ids) else highest
        lowest = min(lowest, place) if rules["valid"].rows(ids) else lowest
    return min(max(threshold, lowest + 1), highest) if lowest < highest else None


def cut_in_two(
    documents: Iterable[tuple[str, np.ndarray]], rule: RowRule, fraction: float
) -> tuple[list[tuple[str, np.ndarray]], str]:
    """Cut the only document that gives rows (and copies of it). Return (side, token ids) of each part, and a line.

    Raises ConfigError where it is too short for a row on each side.
    """
    parts, note = list[tuple[str, np.ndarray]](), ""
    for _, ids in documents:
        if rule.rows(ids):
            train, valid, rows = rule.cut(ids, fraction)
            if not len(valid):
                raise ConfigError(
                    f"data.paths: only one document has the {rule.min_length} tokens of a row, and not those of two; "
                    "training and evaluation need one each; lower data.min_length or data.seq_length, or name "
                    "data.valid_paths"
                )
            parts += [("train", train), ("valid", valid)]
            note = f"data.paths: one document has the length of a row: it is cut into rows, {rows}"
    return parts, note
