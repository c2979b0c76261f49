"""Numbers that are fitted: by golden sections, and the cap of a soft cap."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from driftscope.analysis.explanations.base import F64

CAPS = (20.0, 30.0, 50.0)
"""Caps that published models have."""


def least(function: Callable[[float], float], low: float, high: float, steps: int = 60) -> float:
    """Place of the least value between two bounds, by golden sections."""
    golden = (5**0.5 - 1) / 2
    a, b = high - golden * (high - low), low + golden * (high - low)
    at_a, at_b = function(a), function(b)
    for _ in range(steps):
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - golden * (high - low)
            at_a = function(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + golden * (high - low)
            at_b = function(b)
    return (low + high) / 2


def least_on_grid(
    function: Callable[[float], float], low: float, high: float, *, points: int = 24, steps: int = 26
) -> float:
    """Place of the least value between two positive bounds: the best of a logarithmic grid, refined."""

    def of_log(log: float) -> float:
        return function(float(np.exp(log)))

    grid = np.linspace(np.log(low), np.log(high), points)
    best = int(np.argmin([of_log(float(log)) for log in grid]))
    left, right = float(grid[max(0, best - 1)]), float(grid[min(points - 1, best + 1)])
    return float(np.exp(least(of_log, left, right, steps)))


def capped(value: F64, cap: float) -> F64:
    """``cap * tanh(value / cap)``."""
    return np.asarray(cap * np.tanh(value / cap))


def uncapped(value: F64, cap: float) -> F64:
    """The inverse of `capped`; beyond the cap a large finite value."""
    return np.asarray(cap * np.arctanh(np.clip(value / cap, -1 + 1e-15, 1 - 1e-15)))
