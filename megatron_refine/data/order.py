"""The order of the samples: a pure function of the seed, so that a run resumes anywhere with one integer."""

from functools import lru_cache

import numpy as np


def sample_rows(seed: int, first: int, count: int, num_rows: int) -> np.ndarray:
    """Return the rows of the samples `first` .. `first + count - 1` of a run: [count] int64 in [0, num_rows).

    The run's stream of samples is one permutation of all rows after another. Sample i depends on (seed, i) alone: not
    on the batch size, the number of ranks or where the run was resumed.
    """
    assert num_rows > 0 and first >= 0 and count >= 0, (num_rows, first, count)
    end = first + count
    pieces = [np.empty(0, np.int64)]
    for epoch in range(first // num_rows, -(-end // num_rows)):
        start = epoch * num_rows
        pieces.append(_permutation(seed, epoch, num_rows)[max(first - start, 0) : end - start])
    return np.concatenate(pieces)


@lru_cache(maxsize=2)  # the epoch at hand, and the next one at its edge
def _permutation(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    # NumPy keeps the raw bits of Philox the same for ever, but not what Generator.permutation makes of them.
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(num_rows)
    order = np.argsort(bits, kind="stable")
    order.setflags(write=False)
    return order


def rank_samples(first: int, global_batch: int, mini_batch: int, dp_rank: int, dp: int) -> np.ndarray:
    """Return a data-parallel rank's samples of a batch: its part of each mini-batch in turn, [global_batch / dp].

    The samples of an optimizer step are therefore the same at any number of ranks.
    """
    assert global_batch % mini_batch == 0 and mini_batch % dp == 0, (global_batch, mini_batch, dp)
    share = mini_batch // dp
    starts = first + np.arange(0, global_batch, mini_batch) + dp_rank * share
    return (starts[:, None] + np.arange(share)).ravel()
