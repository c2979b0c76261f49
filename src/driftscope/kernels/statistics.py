"""Statistics of an op's output: the moments of every token, pooled into any set of tokens.

Values that are not finite are counted and left out of everything else, so that one NaN does not hide the
rest; the counts say how many were left out. Moments are in float64 and in a fixed order; a set of tokens is
pooled from the moments of its tokens, so a scope is never computed from another population than it names.

`driftscope.kernels.reference.statistics` is the same in plain NumPy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.kernels.jit import kernel
from driftscope.kernels.parallel import over_rows


@dataclass(frozen=True)
class PooledStatistics:
    """Statistics over all channels of some tokens.

    Attributes:
        token_count: tokens.
        count: values, finite or not: tokens times channels.
        min: smallest finite value; None where no value is finite, as for max, mean and rms.
        max: largest finite value.
        mean: mean of the finite values.
        std: their standard deviation (n - 1); None where fewer than two values are finite.
        rms: root of the mean of their squares.
        nan_count: NaNs.
        inf_count: infinities.
        zero_count: zeros of either sign.
        argmax_channel: channel of the largest finite |value|, the first one on a tie; -1 where there is none.
        argmax_position: its token, counted from the `origin` that was asked for; -1 where there is none.
    """

    token_count: int
    count: int
    min: float | None
    max: float | None
    mean: float | None
    std: float | None
    rms: float | None
    nan_count: int
    inf_count: int
    zero_count: int
    argmax_channel: int
    argmax_position: int


@dataclass(frozen=True)
class TapStatistics:
    """Moments of each token of a tap; every array has one entry a token.

    Attributes:
        channels: values of a token.
        finite_count: int64, finite values.
        nan_count: int64.
        inf_count: int64.
        zero_count: int64.
        min: float32, smallest finite value, NaN where there is none; max likewise.
        mean: float64, mean of the finite values, 0 where there is none.
        centred: float64, sum of (value - mean)^2 over the finite values.
        argmax_channel: int64, first channel with the largest finite |value|, -1 where there is none.
    """

    channels: int
    finite_count: NDArray[np.int64]
    nan_count: NDArray[np.int64]
    inf_count: NDArray[np.int64]
    zero_count: NDArray[np.int64]
    min: NDArray[np.float32]
    max: NDArray[np.float32]
    mean: NDArray[np.float64]
    centred: NDArray[np.float64]
    argmax_channel: NDArray[np.int64]

    def pooled(self, first: int, end: int, *, origin: int = 0) -> PooledStatistics:
        """Pool tokens ``first..end``; by the parallel-axis theorem (Chan, Golub and LeVeque 1983).

        Args:
            first: first token.
            end: the token after the last one.
            origin: token that `argmax_position` counts from: the first one of the prompt.
        """
        if not 0 <= first < end <= len(self.mean):
            raise ValueError(f"tokens {first} to {end} of {len(self.mean)}: expected at least one of them")
        tokens = slice(first, end)
        counts = self.finite_count[tokens].astype(np.float64)
        n = int(self.finite_count[tokens].sum())
        mean = std = rms = low = high = None
        channel = position = -1
        if n:
            means = self.mean[tokens]
            mean = math.fsum((counts * means).tolist()) / n
            away = means - mean
            centred = math.fsum([*self.centred[tokens].tolist(), *(counts * away * away).tolist()])
            std = math.sqrt(centred / (n - 1)) if n > 1 else None
            rms = math.sqrt(centred / n + mean * mean)
            low, high = float(np.nanmin(self.min[tokens])), float(np.nanmax(self.max[tokens]))
            peaks = np.maximum(np.abs(self.min[tokens]), np.abs(self.max[tokens]))
            row = first + int(np.nanargmax(peaks))
            channel, position = int(self.argmax_channel[row]), row - origin
        return PooledStatistics(
            token_count=end - first,
            count=(end - first) * self.channels,
            min=low,
            max=high,
            mean=mean,
            std=std,
            rms=rms,
            nan_count=int(self.nan_count[tokens].sum()),
            inf_count=int(self.inf_count[tokens].sum()),
            zero_count=int(self.zero_count[tokens].sum()),
            argmax_channel=channel,
            argmax_position=position,
        )


def tap_statistics(x: NDArray[np.float32], *, threads: int = 1) -> TapStatistics:
    """Take the moments of every token of a tap.

    Args:
        x: ``float32[n_tokens, channels]``.
        threads: number of threads; the result does not depend on it.
    """
    x = np.ascontiguousarray(x, np.float32)
    n, channels = x.shape
    counts = np.zeros((n, 5), np.int64)
    extremes = np.full((n, 2), np.nan, np.float32)
    moments = np.zeros((n, 2))

    def work(first: int, end: int) -> None:
        _tap_statistics(x[first:end], counts[first:end], extremes[first:end], moments[first:end])

    over_rows(work, n, threads=threads)
    finite, nans, infinite, zeros, peak = counts.T.copy()
    low, high = extremes.T.copy()
    mean, centred = moments.T.copy()
    return TapStatistics(channels, finite, nans, infinite, zeros, low, high, mean, centred, peak)


@kernel("void(R(float32, 2), int64[:, ::1], float32[:, ::1], float64[:, ::1])")
def _tap_statistics(x: Any, counts: Any, extremes: Any, moments: Any) -> None:
    channels = x.shape[1]
    for t in range(x.shape[0]):
        finite, nans, zeros, peak = 0, 0, 0, -1
        largest = np.float32(-1.0)
        low, high = np.float32(np.inf), np.float32(-np.inf)
        total = 0.0
        for c in range(channels):
            value = x[t, c]
            if np.isfinite(value):
                finite += 1
                zeros += 1 if value == 0 else 0
                low = min(low, value)
                high = max(high, value)
                total += np.float64(value)
                if abs(value) > largest:
                    largest, peak = abs(value), c
            elif np.isnan(value):
                nans += 1
        counts[t, 0] = finite
        counts[t, 1] = nans
        counts[t, 2] = channels - finite - nans
        counts[t, 3] = zeros
        counts[t, 4] = peak
        if finite:
            extremes[t, 0] = low
            extremes[t, 1] = high
            mean = total / finite
            squares, residue = 0.0, 0.0
            for c in range(channels):
                if np.isfinite(x[t, c]):
                    away = np.float64(x[t, c]) - mean
                    squares += away * away
                    residue += away
            moments[t, 0] = mean
            # The residue is the rounding of the mean (Chan, Golub and LeVeque 1983, equation 1.7).
            moments[t, 1] = max(squares - residue * residue / finite, 0.0)
