"""The published tensor sweep by its rules: what it compares, how it adds up, what it says and passes.

Facts (paiml/aprender, `apr diff --values` of SHIP-003): tensors of the same normalized name are compared, the
others not mentioned; two tensors of unlike shapes value by value in stored order, up to the shorter; a pair
with a value that is not finite counts as a large difference and goes into no sum and no maximum; sums are in
f64, in order, and the cosine is rounded to f32, 0 where a side is all zeros; the class follows from the
largest difference alone; reversed shapes are `Transposed` where 99 % of the values agree in stored order; and
the exit code is 0 whatever was found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]

FLOOR = 0.9999999403953552
"""The published smallest cosine: the f32 number next below 1."""

ACCEPTED_COSINE = 0.999
"""No tensor was below this one, as the published sweep was read."""

EXIT_CODE = 0

_STATUS_BELOW = ((1e-3, "NearlyIdentical"), (1e-2, "SmallDiff"), (1e-1, "MediumDiff"), (1.0, "LargeDiff"))
_FINE = ("Identical", "NearlyIdentical", "SmallDiff", "Transposed")


@dataclass(frozen=True)
class PublishedRow:
    """What the published sweep prints of one tensor."""

    cosine: float
    max_diff: float
    identical_count: int
    status: str


@dataclass(frozen=True)
class PublishedResult:
    """What the published sweep prints of two models."""

    rows: Mapping[str, PublishedRow]

    @property
    def passes(self) -> bool:
        """Whether its reader finds nothing: no class beyond small differences, no cosine below 0.999."""
        return all(row.status in _FINE and row.cosine >= ACCEPTED_COSINE for row in self.rows.values())


def published_sweep(
    a: Mapping[str, F32], b: Mapping[str, F32], threshold: float | None = None
) -> PublishedResult:
    """Compare two models by the published rules.

    Args:
        a: name to values, in the shape that the model says.
        b: likewise.
        threshold: taken and not looked at, as there.
    """
    del threshold
    return PublishedResult({name: published_row(a[name], b[name]) for name in sorted(a) if name in b})


def published_row(a: F32, b: F32) -> PublishedRow:
    """Compare two tensors by the published rules."""
    x, y = a.reshape(-1), b.reshape(-1)
    count = min(x.size, y.size)
    x, y = x[:count], y[:count]
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    differences = np.abs(x - y)
    largest = float(differences.max(initial=np.float32(0.0)))
    same = int((differences == 0).sum())
    return PublishedRow(printed_cosine(x, y), largest, same, _status(a.shape, b.shape, largest, same, count))


def printed_cosine(x: F32, y: F32) -> float:
    """The cosine as it was printed: f64 sums in order, the quotient rounded to f32."""
    dot, xx, yy = (_in_order(p, q, np.float64) for p, q in ((x, y), (x, x), (y, y)))
    return float(np.float32(dot / (np.sqrt(xx) * np.sqrt(yy)))) if xx > 0 and yy > 0 else 0.0


def float32_cosine(x: F32, y: F32) -> float:
    """The cosine as f32 arithmetic throughout gives it: sums in order, root and quotient in f32."""
    dot, xx, yy = (np.float32(_in_order(p, q, np.float32)) for p, q in ((x, y), (x, x), (y, y)))
    return float(dot / (np.sqrt(xx) * np.sqrt(yy))) if xx > 0 and yy > 0 else 0.0


def exact_distance(x: F32, y: F32) -> float:
    """``1 - cosine`` from the difference of the normalized tensors, in f64: nothing cancels."""
    u, v = (side.astype(np.float64) for side in (x, y))
    u, v = u / np.sqrt(np.sum(u * u)), v / np.sqrt(np.sum(v * v))
    return float(np.sum((u - v) ** 2) / 2.0)


def _in_order(p: F32, q: F32, kind: type[np.floating]) -> float:
    """A sum of products from left to right; each product and each partial sum rounded to `kind`."""
    if not p.size:
        return 0.0
    return float(np.cumsum(p.astype(kind) * q.astype(kind), dtype=kind)[-1])


def _status(shape_a: tuple[int, ...], shape_b: tuple[int, ...], largest: float, same: int, count: int) -> str:
    reversed_ = shape_a != shape_b and len(shape_a) == 2 and shape_a == shape_b[::-1]
    if reversed_ and count and same / count > 0.99:
        return "Transposed"
    if reversed_ and largest < 0.1:
        return "MediumDiff"
    if (shape_a != shape_b and not reversed_) or not count:
        return "Critical"
    if largest == 0:
        return "Identical"
    return next((status for bound, status in _STATUS_BELOW if largest < bound), "Critical")
