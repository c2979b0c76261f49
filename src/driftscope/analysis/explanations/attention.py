"""What can be wrong with attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from driftscope.analysis.explanations.base import F64, Candidate, Case, figure, rounded

_CAPS = (20.0, 30.0, 50.0)


def soft_capped(case: Case, values: Sequence[F64], what: str) -> Iterator[Candidate]:
    """A soft cap that should not be, or none where one should be: fitted from the largest values.

    Args:
        case: the case; `values` are what it expects.
        values: what would be capped.
        what: its name.
    """

    def capped(cap: float) -> list[F64]:
        return [cap * np.tanh(value / cap) for value in values]

    def uncapped(cap: float) -> list[F64]:
        inside = [np.clip(value / cap, -1 + 1e-15, 1 - 1e-15) for value in values]
        return [cap * np.arctanh(value) for value in inside]

    largest = max(float(np.abs(np.where(np.isfinite(v), v, 0.0)).max(initial=0.0)) for v in values)
    if largest == 0.0:
        return
    for make, text, low in (
        (capped, f"{what} are capped at {{}}", 0.02 * largest),
        (uncapped, f"{what} lack their cap of {{}}", 1.0001 * largest),
    ):
        fitted = _fit_cap(case, make, low, 1e3 * largest)
        for cap, complexity in (*((cap, 0) for cap in _CAPS), (fitted, 1)):
            if cap > low:
                predicted = make(cap)
                yield Candidate(
                    "soft-cap",
                    text.format(figure(cap)),
                    predicted if case.ragged else predicted[0],
                    complexity,
                    {"cap": rounded(cap), "largest": rounded(largest)},
                )


def _fit_cap(case: Case, make: Callable[[float], list[F64]], low: float, high: float) -> float:
    def misfit(log: float) -> float:
        found = make(float(np.exp(log)))
        return case.error(found if case.ragged else found[0])

    grid = np.linspace(np.log(low), np.log(high), 40)
    best = int(np.argmin([misfit(float(log)) for log in grid]))
    left, right = float(grid[max(0, best - 1)]), float(grid[min(len(grid) - 1, best + 1)])
    return float(np.exp(least(misfit, left, right, 30)))


def least(function: Callable[[float], float], low: float, high: float, steps: int = 60) -> float:
    """Place of the least value between two bounds, by golden sections."""
    golden = (5**0.5 - 1) / 2
    for _ in range(steps):
        a, b = high - golden * (high - low), low + golden * (high - low)
        if function(a) < function(b):
            high = b
        else:
            low = a
    return (low + high) / 2


SCORES: tuple[Callable[[Case], Iterator[Candidate]], ...] = ()
SOFTMAX: tuple[Callable[[Case], Iterator[Candidate]], ...] = ()
OUTPUT: tuple[Callable[[Case], Iterator[Candidate]], ...] = ()
