"""Statistics of some values in plain NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def pooled(x: NDArray[np.float32]) -> dict[str, Any]:
    """The fields of `driftscope.kernels.statistics.PooledStatistics` of ``[tokens, channels]``."""
    finite = np.isfinite(x)
    values = x[finite].astype(np.float64)
    n = len(values)
    peak = np.where(finite, np.abs(x), np.float32(-1))
    position, channel = np.unravel_index(int(peak.argmax()), x.shape) if n else (-1, -1)
    return {
        "token_count": x.shape[0],
        "count": x.size,
        "min": values.min() if n else None,
        "max": values.max() if n else None,
        "mean": values.mean() if n else None,
        "std": values.std(ddof=1) if n > 1 else None,
        "rms": np.sqrt(np.square(values).mean()) if n else None,
        "nan_count": int(np.isnan(x).sum()),
        "inf_count": int(np.isinf(x).sum()),
        "zero_count": int((x == 0).sum()),
        "argmax_channel": int(channel),
        "argmax_position": int(position),
    }


def lane_moments(row: NDArray[np.float32]) -> tuple[float, float]:
    """Mean of a row's finite values and sum of their squared distances from it, in the kernel's order.

    Sixteen sums in float64, each of every sixteenth channel, added half to half.
    """
    lanes = 16
    finite = np.isfinite(row)
    n = int(finite.sum())

    def total(values: NDArray[np.float64]) -> float:
        padded = np.zeros(-(-len(values) // lanes) * lanes)
        padded[: len(values)] = np.where(finite, values, 0.0)
        sums = np.zeros(lanes)
        for group in padded.reshape(-1, lanes):
            sums = sums + group
        while len(sums) > 1:
            half = len(sums) // 2
            sums = sums[:half] + sums[half:]
        return float(sums[0])

    with np.errstate(invalid="ignore"):
        wide = row.astype(np.float64)
        mean = total(wide) / n
        away = wide - mean
        residue = total(away)
        return mean, max(total(away * away) - residue * residue / n, 0.0)
