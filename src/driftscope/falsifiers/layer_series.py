"""The published figures of 28 layers: do they show an error that builds up, or independent draws?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from driftscope.errors import InputError
from driftscope.falsifiers.reader import EvidenceReader
from driftscope.falsifiers.sampling import F64, Resampling, generator, parameter, rounded, with_interval
from driftscope.falsifiers.super_block import F32, gaussian_rows, path_a, path_b, random_rows
from driftscope.kernels.reference import published

_NORMAL_97_5 = 1.959963984540054
_POOL = 4096
_CONTROL_GROWTH = 1.5
_DOMAIN_GROWTH = (1.0, 1.02, 1.05, 1.1, 1.25, 1.5)
_SHUFFLES = 101
_AT_MOST = ("drops", "close", "smallest")
_FLOOR = 1e-9

Draw = Callable[[int, int, int], F64]
"""From seed, chains and layers to ``float64[chains, layers]``."""


def inputs(parameters: Mapping[str, Any]) -> list[str]:
    """Name the evidence that is read: none, the figures are printed and the null models are drawn."""
    return []


def measure(
    parameters: Mapping[str, Any],
    regimes: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    evidence: EvidenceReader,
) -> dict[str, Any]:
    """Say where statistics of a printed series fall among those of layers drawn independently.

    An error that is handed on from layer to layer falls rarely and ends higher than it began. The null model
    has neither: every layer is a draw of its own.

    Args:
        parameters: `layers`, the printed figures in order of depth, in percent; `five`, those of the
            falsifier that had five layers; `chains` drawn for each seed; `resamples`, `confidence`.
        regimes: name to `null`: ``permuted`` (the printed figures in random order), ``ratio`` (absolute
            ratios of two normal variates, what a difference over a sum that may cancel tends to) or
            ``blocks`` (random Q4_K blocks times the published activation, path A against path B).
        seeds: each draws chains of every null model.
        evidence: not read.

    Returns:
        In each regime probabilities under the null model, with the 95 % interval of their sampling
        (Wilson 1927): `p_drops` of so few layers or fewer that lie below the one before; `p_trend` of a
        rank correlation of figure and depth (Spearman 1904) as large or larger; `p_growth` of last over
        first layer as large or larger; `p_largest` and `p_mean` of a largest value and a mean as large and
        `p_smallest` of a smallest as small, all over the median; `p_close` of so few neighbours within a
        tenth. `null` has the 2.5 %, 50 % and 97.5 % quantiles of each statistic, `published` the statistics
        of the printed series. Controls and domain have the median of `p_trend` and `p_drops` over shuffled
        series that grow with depth by a known factor a layer.
    """
    layers = _series(parameters, "layers", 3)
    five = _series(parameters, "five", 3)
    chains = parameter(parameters, "chains", int, least=100)
    resampling = Resampling.of(parameters)

    def judged(values: F64, draw: Draw, chosen: Sequence[int]) -> dict[str, Any]:
        return _probabilities(values, np.concatenate([draw(seed, chains, len(values)) for seed in chosen]))

    found: dict[str, Any] = {}
    for name, regime in regimes.items():
        kind = parameter(regime, "null", str)
        found[name] = judged(layers, _null(kind, layers), seeds)
        found[name]["five"] = {
            key: value
            for key, value in judged(five, _null(kind, five), seeds).items()
            if key in ("p_growth", "p_step")
        }
    # In ranks every permutation of distinct figures has one null distribution.
    permuted = _null("permuted", layers)
    null = _statistics(np.concatenate([permuted(seed, chains, len(layers)) for seed in seeds]))

    def grown(growth: float) -> dict[str, Any]:
        shuffled = generator(seeds[0], 3).permuted(np.broadcast_to(layers, (_SHUFFLES, len(layers))), axis=1)
        seen = _statistics(shuffled * growth ** np.arange(len(layers)))
        metrics = {
            f"p_{name}": with_interval(_median, _tail(name, seen[name], null[name]), resampling)
            for name in ("trend", "drops")
        }
        return {"growth_each_layer": growth, **metrics}

    return {
        "samples": chains * len(seeds) * len(regimes),
        "published": _statistics_of(layers),
        "published_five": _statistics_of(five),
        "regimes": found,
        "controls": {"compounding": grown(_CONTROL_GROWTH), "independent": grown(1.0)},
        "domain": [grown(growth) for growth in _DOMAIN_GROWTH],
    }


def _series(parameters: Mapping[str, Any], name: str, least: int) -> F64:
    given = parameters.get(name)
    try:
        values = np.array(given, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"measurement parameter `{name}` is malformed: {error}") from error
    if values.ndim != 1 or len(values) < least or not np.all(values > 0.0):
        raise InputError(f"measurement parameter `{name}` is {given!r}; expected {least} positive numbers")
    return values


def _null(kind: str, values: F64) -> Draw:
    """A null model by name."""

    def permuted(seed: int, chains: int, layers: int) -> F64:
        return generator(seed, 0).permuted(np.broadcast_to(values, (chains, layers)), axis=1)

    def ratio(seed: int, chains: int, layers: int) -> F64:
        random = generator(seed, 1)
        shape = (chains, layers)
        quotient: F64 = np.abs(random.standard_normal(shape) / random.standard_normal(shape))
        return quotient

    def blocks(seed: int, chains: int, layers: int) -> F64:
        random = generator(seed, 2)
        pool = block_figures(random, _POOL)
        return pool[random.integers(0, _POOL, (chains, layers))]

    known = {"permuted": permuted, "ratio": ratio, "blocks": blocks}
    if kind not in known:
        raise InputError(f"measurement parameter `null` is {kind!r}; expected one of {', '.join(known)}")
    return known[kind]


def block_figures(random: np.random.Generator, count: int) -> F64:
    """``|A-B| / |A|`` of random Q4_K blocks times the published activation: ``float64[count]``."""
    ramp = published.activation()[None]
    half = count // 2
    rows = np.concatenate([random_rows(random, half), gaussian_rows(random, count - half)])
    a, b = path_a(rows, ramp)[0], path_b(rows, ramp, "apr_q8k")[0]
    # Where the two agree to the last bit, the figure is as small as the metric's own floor.
    return np.maximum(scalar_difference(a, b), _FLOOR)


def scalar_difference(a: F32, b: F32) -> F64:
    """The published scalar metric, ``|A-B| / max(|A|, 1e-9)``, in f64."""
    exact = a.astype(np.float64)
    difference: F64 = np.abs(exact - b) / np.maximum(np.abs(exact), _FLOOR)
    return difference


def _statistics(series: F64) -> dict[str, F64]:
    """Statistics of ``float64[n, layers]``, each ``float64[n]``."""
    steps = np.diff(series, axis=1)
    depth = np.arange(series.shape[1]) - (series.shape[1] - 1) / 2
    ranks = np.argsort(np.argsort(series, axis=1, kind="stable"), axis=1).astype(np.float64)
    ranks -= ranks.mean(axis=1, keepdims=True)
    median = np.median(series, axis=1)
    return {
        "drops": (steps < 0.0).sum(axis=1).astype(np.float64),
        "trend": (ranks * depth).sum(axis=1) / np.square(depth).sum(),
        "growth": series[:, -1] / series[:, 0],
        "largest": series.max(axis=1) / median,
        "smallest": series.min(axis=1) / median,
        "mean": series.mean(axis=1) / median,
        "close": (np.abs(steps) <= 0.1 * series[:, :-1]).sum(axis=1).astype(np.float64),
        "step": series[:, -1] / series[:, -2],
    }


def _statistics_of(series: F64) -> dict[str, Any]:
    figures: dict[str, Any] = {
        name: rounded(float(value[0])) for name, value in _statistics(series[None]).items()
    }
    return figures | {
        "layers": len(series),
        "smallest_percent": rounded(float(series.min())),
        "largest_percent": rounded(float(series.max())),
        "mean_percent": rounded(float(series.mean())),
        "median_percent": rounded(float(np.median(series))),
    }


def _probabilities(series: F64, drawn: F64) -> dict[str, Any]:
    seen = _statistics(series[None])
    null = _statistics(drawn)
    found: dict[str, Any] = {}
    for name, values in null.items():
        share = float(_tail(name, seen[name], values)[0])
        found[f"p_{name}"] = _share(round(share * len(values)), len(values))
    found["null"] = {
        name: [rounded(float(end)) for end in np.quantile(values, [0.025, 0.5, 0.975])]
        for name, values in null.items()
    }
    return found


def _tail(name: str, seen: F64, null: F64) -> F64:
    """Share of the null model that is as far out as each value seen; ties count."""
    ordered = np.sort(null)
    # A permutation keeps mean and largest as they are, up to the order of a sum.
    slack = 1e-9 * np.abs(seen)
    if name in _AT_MOST:
        hits = np.searchsorted(ordered, seen + slack, side="right")
    else:
        hits = len(ordered) - np.searchsorted(ordered, seen - slack, side="left")
    share: F64 = hits / len(ordered)
    return share


def _median(sample: F64) -> F64:
    middle: F64 = np.median(sample, axis=1)
    return middle


def _share(hits: int, count: int) -> dict[str, float]:
    """A share with Wilson's interval at 95 %."""
    z = _NORMAL_97_5
    share = hits / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    low, high = min(share, middle - half), max(share, middle + half)
    return {"value": rounded(share), "low": rounded(low), "high": rounded(high)}
