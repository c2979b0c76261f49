"""Draws, intervals and rounding: what every measurement shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from driftscope.analysis.proportion import clopper_pearson
from driftscope.errors import InputError

F64 = NDArray[np.float64]
Number = TypeVar("Number", int, float, str)

_SIGNIFICANT_DIGITS = 10
_BOOTSTRAP_SEED = 0xB007


def generator(*key: int) -> np.random.Generator:
    """Return a Philox generator of its own for a seed and what is drawn with it."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def parameter(
    parameters: Mapping[str, Any], name: str, kind: type[Number], *, least: float | None = None
) -> Number:
    """Return a parameter of a measurement, checked.

    Raises:
        InputError: it is missing, of another kind, or below `least`.
    """
    if name not in parameters:
        raise InputError(f"measurement parameter `{name}` is missing; expected {kind.__name__}")
    value = parameters[name]
    accepted = (int, float) if kind is float else (kind,)
    if not isinstance(value, accepted) or isinstance(value, bool):
        raise InputError(f"measurement parameter `{name}` is {value!r}; expected {kind.__name__}")
    if least is not None and not isinstance(value, str) and value < least:
        raise InputError(f"measurement parameter `{name}` is {value!r}; expected at least {least}")
    return kind(value)


@dataclass(frozen=True)
class Resampling:
    """How intervals are made."""

    resamples: int
    confidence: float

    @classmethod
    def of(cls, parameters: Mapping[str, Any]) -> Resampling:
        """Read `resamples` and `confidence`."""
        resamples = parameter(parameters, "resamples", int, least=100)
        confidence = parameter(parameters, "confidence", float, least=0.0)
        if not 0.0 < confidence < 1.0:
            raise InputError(f"measurement parameter `confidence` is {confidence}; expected between 0 and 1")
        return cls(resamples, confidence)


def rounded(value: float) -> float:
    """Keep ten significant digits: logarithms differ in the last bits between C libraries."""
    return float(f"{float(value):.{_SIGNIFICANT_DIGITS - 1}e}")


def with_interval(statistic: Callable[[F64], F64], clusters: F64, resampling: Resampling) -> dict[str, float]:
    """Return a statistic of clusters with its percentile bootstrap interval (Efron 1979).

    Args:
        statistic: from ``f64[b, n_clusters, ...]``, b samples, to ``f64[b]``.
        clusters: ``f64[n_clusters, ...]``; whole clusters are drawn with replacement.
        resampling: number of samples, confidence.

    Returns:
        ``{value, low, high}``.
    """
    count = clusters.shape[0]
    draws = generator(_BOOTSTRAP_SEED, count).integers(0, count, size=(resampling.resamples, count))
    # In parts: a sample holds all the values again.
    samples = np.concatenate([statistic(clusters[part]) for part in np.array_split(draws, 50)])
    tail = (1.0 - resampling.confidence) / 2.0
    low, high = np.quantile(samples, [tail, 1.0 - tail])
    point = float(statistic(clusters[None])[0])
    return {"value": rounded(point), "low": rounded(float(low)), "high": rounded(float(high))}


def share_with_interval(hits: int, count: int, resampling: Resampling) -> dict[str, float]:
    """Return a share of independent trials with its exact interval (Clopper and Pearson 1934).

    Args:
        hits: trials that hit.
        count: trials, at least one.
        resampling: confidence; nothing is resampled.

    Returns:
        ``{value, low, high}``; no trial that hits has the low end 0, all that hit have the high end 1.
    """
    low, high = clopper_pearson(hits, count, resampling.confidence)
    return {"value": rounded(hits / count), "low": rounded(low), "high": rounded(high)}
