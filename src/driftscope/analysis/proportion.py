"""The interval of a share of trials."""

from __future__ import annotations


def clopper_pearson(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact interval of a binomial probability (C. Clopper and E. Pearson, Biometrika 26, 1934).

    No trial that hits has the low end 0, all that hit have the high end 1.
    """
    from scipy.special import betaincinv

    tail = (1.0 - confidence) / 2.0
    low = float(betaincinv(hits, trials - hits + 1, tail)) if hits else 0.0
    high = float(betaincinv(hits + 1, trials - hits, 1.0 - tail)) if hits < trials else 1.0
    return low, high
