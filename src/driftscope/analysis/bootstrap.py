"""Block bootstrap over token positions: neighbouring positions share a context and are not independent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def position_blocks(sequences: Sequence[str], length: int) -> NDArray[np.int64]:
    """Number the bootstrap block of each token position.

    Args:
        sequences: for each position the sequence it belongs to; the positions of a sequence are contiguous.
        length: positions a block; the last block of a sequence may be shorter. No block spans two sequences.

    Returns:
        ``int64[n_positions]``, block numbers from 0 in order of appearance.
    """
    blocks = np.empty(len(sequences), dtype=np.int64)
    block, filled = -1, length
    for index, sequence in enumerate(sequences):
        if filled == length or sequence != sequences[index - 1]:
            block, filled = block + 1, 0
        blocks[index] = block
        filled += 1
    return blocks


def resampled_sums(
    values: NDArray[np.float64], blocks: NDArray[np.int64], resamples: int, seed: int
) -> NDArray[np.float64]:
    """Sum each row of `values` over blocks drawn with replacement.

    Args:
        values: ``float64[n_items, n_positions]``.
        blocks: block number of each position.
        resamples: number of bootstrap samples.
        seed: seed of the Philox generator; the same draw serves every item, so that ratios of items are
            those of one sample.

    Returns:
        ``float64[n_items, resamples]``.
    """
    n_blocks = int(blocks[-1]) + 1
    sums = np.zeros((values.shape[0], n_blocks))
    for block in range(n_blocks):
        sums[:, block] = values[:, blocks == block].sum(axis=1)
    draws = np.random.Generator(np.random.Philox(seed)).integers(0, n_blocks, size=(resamples, n_blocks))
    total = np.zeros((values.shape[0], resamples))
    for column in range(n_blocks):
        total += sums[:, draws[:, column]]
    return total


def interval(samples: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    """Return the percentile interval of bootstrap samples (Efron 1979), ends included."""
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(samples, [tail, 1.0 - tail])
    return float(low), float(high)
