"""Held-out documents: their text alone decides, so that equal documents never stand on both sides."""

import hashlib
from collections.abc import Iterable

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


def adjusted_threshold(documents: Iterable[tuple[str, np.ndarray]], rule: RowRule, threshold: int) -> int:
    """Return the threshold nearest to `threshold` that leaves a document that gives rows on each side.

    documents: texts with their token ids [length]. Raises ConfigError where only one (or copies of it) gives rows.
    """
    usable = sorted({share(text) for text, ids in documents if rule.rows(ids)})
    if len(usable) < 2:
        raise ConfigError(
            f"data.paths: only one document has the {rule.min_length} tokens of a row, but training and evaluation "
            "need one each; lower data.min_length or data.seq_length, or name data.valid_paths"
        )
    return min(max(threshold, usable[0] + 1), usable[-1])
