"""Statistics of an op's output: the moments of every token, pooled into any set of tokens.

Values that are not finite are counted and left out of everything else, so that one NaN does not hide the
rest; the counts say how many were left out. Moments are in float64: sixteen sums, each of every sixteenth
channel in order, then added half to half; squares are of distances from the mean. A set of tokens is pooled
from the moments of its tokens, so a scope is never computed from another population than it names.

`driftscope.kernels.reference.statistics` is the same in plain NumPy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.kernels.jit import device, kernel
from driftscope.kernels.moments import LANES, take_extremes_and_sums, take_squares
from driftscope.kernels.parallel import over_rows

_GRAIN = 1 << 18


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

    @cached_property
    def _columns(self) -> list[list[Any]]:
        """What pooling reads, as Python's numbers: many scopes are pooled from few tokens."""
        arrays = (self.finite_count, self.mean, self.centred, self.min, self.max, self.argmax_channel)
        counts = (self.nan_count, self.inf_count, self.zero_count)
        return [array.tolist() for array in (*arrays, *counts)]

    def pooled(self, first: int, end: int, *, origin: int = 0) -> PooledStatistics:
        """Pool tokens ``first..end``; by the parallel-axis theorem (Chan, Golub and LeVeque 1983).

        Args:
            first: first token.
            end: the token after the last one.
            origin: token that `argmax_position` counts from: the first one of the prompt.
        """
        if not 0 <= first < end <= len(self.mean):
            raise ValueError(f"tokens {first} to {end} of {len(self.mean)}: expected at least one of them")
        finite, means, centred, lows, highs, peaks, *counts = self._columns
        rows = [row for row in range(first, end) if finite[row]]
        n = sum(finite[first:end])
        mean = std = rms = low = high = None
        channel = position = -1
        if rows:
            row = rows[0]
            mean, spread, low, high = means[row], centred[row], lows[row], highs[row]
            if len(rows) > 1:
                mean = math.fsum([finite[r] * means[r] for r in rows]) / n
                spread = math.fsum([centred[r] + finite[r] * (means[r] - mean) ** 2 for r in rows])
                low, high = min([lows[r] for r in rows]), max([highs[r] for r in rows])
                peak = max(-low, high)
                row = next(r for r in rows if -lows[r] == peak or highs[r] == peak)
            std = math.sqrt(spread / (n - 1)) if n > 1 else None
            rms = math.sqrt(spread / n + mean * mean)
            channel, position = peaks[row], row - origin
        nans, infinite, zeros = [sum(column[first:end]) for column in counts]
        return PooledStatistics(
            token_count=end - first,
            count=(end - first) * self.channels,
            min=low,
            max=high,
            mean=mean,
            std=std,
            rms=rms,
            nan_count=nans,
            inf_count=infinite,
            zero_count=zeros,
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

    # A thread costs more than the statistics of a few thousand values.
    over_rows(work, n, threads=threads, grain=max(1, _GRAIN // max(1, channels)))
    finite, nans, infinite, zeros, peak = counts.T.copy()
    low, high = extremes.T.copy()
    mean, centred = moments.T.copy()
    return TapStatistics(channels, finite, nans, infinite, zeros, low, high, mean, centred, peak)


@device
def _first_of_magnitude(row: Any, magnitude: Any) -> Any:
    """First channel whose magnitude it is; whole pieces without it are passed in vectors."""
    channels = row.shape[0]
    for start in range(0, channels, 64):
        stop = min(start + 64, channels)
        hits = np.int32(0)
        for c in range(start, stop):
            hits += np.int32(abs(row[c]) == magnitude)
        if hits:
            for c in range(start, stop):
                if abs(row[c]) == magnitude:
                    return c
    return -1


@device
def _sum_of_lanes(lanes: Any) -> Any:
    """Sum of the lanes, halves added to halves."""
    for half in (8, 4, 2, 1):
        for i in range(half):
            lanes[i] += lanes[i + half]
    return lanes[0]


@kernel("void(R(float32, 2), int64[:, ::1], float32[:, ::1], float64[:, ::1])")
def _tap_statistics(x: Any, counts: Any, extremes: Any, moments: Any) -> None:
    channels = x.shape[1]
    groups = channels // LANES
    sums, distances = np.empty(LANES), np.empty((2, LANES))
    ends = np.empty((2, LANES), np.float32)
    tallies = np.empty((3, LANES), np.int32)
    for t in range(x.shape[0]):
        row = x[t]
        sums[:], ends[0], ends[1], tallies[:] = 0.0, np.inf, -np.inf, 0
        take_extremes_and_sums(row, groups, sums, ends, tallies)
        for c in range(groups * LANES, channels):
            value, lane = row[c], c % LANES
            if np.isfinite(value):
                sums[lane] += np.float64(value)
                ends[0, lane] = min(ends[0, lane], value)
                ends[1, lane] = max(ends[1, lane], value)
                tallies[0, lane] += 1
                tallies[2, lane] += 1 if value == 0 else 0
            elif np.isnan(value):
                tallies[1, lane] += 1
        finite, nans, zeros = tallies[0].sum(), tallies[1].sum(), tallies[2].sum()
        counts[t, 0] = finite
        counts[t, 1] = nans
        counts[t, 2] = channels - finite - nans
        counts[t, 3] = zeros
        counts[t, 4] = -1
        if finite:
            # Plus zero, so that a zero has one sign.
            low, high = ends[0].min() + np.float32(0.0), ends[1].max() + np.float32(0.0)
            extremes[t, 0] = low
            extremes[t, 1] = high
            counts[t, 4] = _first_of_magnitude(row, max(abs(low), abs(high)))
            mean = _sum_of_lanes(sums) / finite
            distances[:] = 0.0
            take_squares(row, groups, mean, distances)
            for c in range(groups * LANES, channels):
                if np.isfinite(row[c]):
                    away = np.float64(row[c]) - mean
                    distances[0, c % LANES] += away * away
                    distances[1, c % LANES] += away
            squares, residue = _sum_of_lanes(distances[0]), _sum_of_lanes(distances[1])
            moments[t, 0] = mean
            # The residue is the rounding of the mean (Chan, Golub and LeVeque 1983, equation 1.7).
            moments[t, 1] = max(squares - residue * residue / finite, 0.0)
