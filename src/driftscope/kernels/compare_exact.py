"""One slab of a comparison, value by value in float64: what the fast way falls back on."""

from __future__ import annotations

from typing import Any

import numpy as np

from driftscope.kernels.compare_tile import MEDIUM, SMALL
from driftscope.kernels.jit import bits_of, device, kernel

FIGURES = 13
"""Sums of a, b, a^2, b^2, a b, |a - b|, (a - b)^2, centred a^2, centred b^2; the largest |a - b|; the
expected energy; a and b where the difference is largest."""

TALLIES = 11
"""Pairs that are finite, that are equal, below `SMALL`, below `MEDIUM`; NaNs in a, in b, infinities in a, in
b; whether any pair has different bits; whether the fast way could not answer; the first pair with the largest
difference, -1 where that was not looked for."""


_PART = 256


@device
def largest_of(a: Any, b: Any, count: int, start: int, figures: Any, tallies: Any) -> bool:
    """Look through `count` pairs, of which the first is pair `start`, for a larger difference than is known.

    Returns:
        Whether there is a finite pair.
    """
    any_finite = False
    for i in range(count):
        if np.isfinite(a[i]) and np.isfinite(b[i]):
            any_finite = True
            d = abs(np.float64(a[i]) - np.float64(b[i]))
            if d > figures[9] or tallies[10] < 0:
                figures[9], figures[11], figures[12] = d, np.float64(a[i]), np.float64(b[i])
                tallies[10] = start + i
    return any_finite


@kernel("void(R(float32, 1), R(float32, 1), float64[::1], int64[::1])")
def compare_values(a: Any, b: Any, figures: Any, tallies: Any) -> None:
    """Set all of a slab's figures but the expected energy, and all of its tallies.

    Args:
        a: f32[n].
        b: f32[n].
        figures: f64[FIGURES].
        tallies: int64[TALLIES].
    """
    tallies[:] = 0
    tallies[10] = -1
    figures[:10] = 0.0
    largest_of(a, b, a.size, 0, figures, tallies)
    shift_a, shift_b = 0.0, 0.0
    # Moments are taken about the first pair. Where that is an outlier it is part of the variance itself,
    # so what cancels is at most as many roundings as there are pairs.
    for i in range(a.size):
        if np.isfinite(a[i]) and np.isfinite(b[i]):
            shift_a, shift_b = np.float64(a[i]), np.float64(b[i])
            break
    sums = np.zeros(7)
    part = np.zeros(7)
    for start in range(0, a.size, _PART):
        # Parts are added up by themselves: long sums of small terms would lose digits.
        part[:] = 0.0
        for i in range(start, min(start + _PART, a.size)):
            if bits_of(a[i]) != bits_of(b[i]):
                tallies[8] = 1
            if not (np.isfinite(a[i]) and np.isfinite(b[i])):
                tallies[4] += 1 if np.isnan(a[i]) else 0
                tallies[5] += 1 if np.isnan(b[i]) else 0
                tallies[6] += 1 if np.isinf(a[i]) else 0
                tallies[7] += 1 if np.isinf(b[i]) else 0
                continue
            x, y = np.float64(a[i]), np.float64(b[i])
            d = abs(x - y)
            tallies[0] += 1
            tallies[1] += 1 if d == 0.0 else 0
            tallies[2] += 1 if d < SMALL else 0
            tallies[3] += 1 if d < MEDIUM else 0
            x, y = x - shift_a, y - shift_b
            part[0] += x
            part[1] += y
            part[2] += x * x
            part[3] += y * y
            part[4] += x * y
            part[5] += d
            part[6] += d * d
        for k in range(7):
            sums[k] += part[k]
    sum_a, sum_b, aa, bb, ab, total, dd = sums[0], sums[1], sums[2], sums[3], sums[4], sums[5], sums[6]
    n = np.float64(tallies[0])
    if n > 0:
        figures[0] = sum_a + n * shift_a
        figures[1] = sum_b + n * shift_b
        # One formula for the three: equal tensors give equal sums, and a cosine of exactly 1.
        figures[2] = aa + (shift_a * sum_a + shift_a * sum_a) + n * (shift_a * shift_a)
        figures[3] = bb + (shift_b * sum_b + shift_b * sum_b) + n * (shift_b * shift_b)
        figures[4] = ab + (shift_a * sum_b + shift_b * sum_a) + n * (shift_a * shift_b)
        figures[5] = total
        figures[6] = dd
        figures[7] = max(aa - sum_a * sum_a / n, 0.0)
        figures[8] = max(bb - sum_b * sum_b / n, 0.0)
