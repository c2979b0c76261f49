"""How near can two tensors be and a printed cosine still tell them from equal ones?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from driftscope.errors import InputError
from driftscope.falsifiers.published_sweep import F32, FLOOR, exact_distance, float32_cosine, printed_cosine
from driftscope.falsifiers.reader import EvidenceReader
from driftscope.falsifiers.sampling import Resampling, generator, parameter, rounded, share_with_interval

_STEP = 2.0**-24
"""From 1 to the f32 number next below it."""

_DOMAIN = tuple(10.0**-power for power in range(12, 2, -1))

Cosine = Callable[[F32, F32], float]


def inputs(parameters: Mapping[str, Any]) -> list[str]:
    """Name the evidence that is read: none, tensors are drawn."""
    return []


def measure(
    parameters: Mapping[str, Any],
    regimes: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    evidence: EvidenceReader,
) -> dict[str, Any]:
    """Draw a tensor and two others at a known distance ``1 - cosine``, one ten times as far as the other.

    Args:
        parameters: `values` of a tensor, `draws` for each seed, `resamples` (not used), `confidence`.
        regimes: name to `distance` of the nearer one and `sums`, ``f64`` or ``f32``.
        seeds: each draws tensors.
        evidence: not read.

    Returns:
        In each regime: `told_apart`, the share of draws in which the nearer one prints the larger cosine;
        `nearest` and `farthest`, the cosines that were printed for the nearer one; `largest_error`, the
        largest distance of a printed cosine from the exact one, in steps of f32 below 1. `published`: the
        floor, the distances that print it, and what two pairs 1e-9 apart print.
    """
    values = parameter(parameters, "values", int, least=256)
    draws = parameter(parameters, "draws", int, least=2)
    resampling = Resampling.of(parameters)

    def compare(distance: float, cosine: Cosine, factor: float = 10.0) -> dict[str, Any]:
        drawn = [_drawn(seed, draw, values, distance, factor) for seed in seeds for draw in range(draws)]
        return _metrics(drawn, cosine, resampling)

    return {
        "samples": values * draws * len(seeds) * len(regimes),
        "published": _published(seeds[0], values),
        "regimes": {
            name: compare(parameter(regime, "distance", float, least=1e-13), _cosine_of(name, regime))
            for name, regime in regimes.items()
        },
        "controls": {
            "printed-in-f64": compare(1e-9, lambda x, y: 1.0 - exact_distance(x, y)),
            "same-pair-twice": compare(1e-9, printed_cosine, factor=1.0),
        },
        "domain": [compare(distance, printed_cosine) for distance in _DOMAIN],
    }


def _cosine_of(name: str, regime: Mapping[str, Any]) -> Cosine:
    sums = parameter(regime, "sums", str)
    if sums not in ("f64", "f32"):
        raise InputError(f"regime {name}: `sums` is {sums!r}; expected f64 or f32")
    return printed_cosine if sums == "f64" else float32_cosine


def _drawn(seed: int, draw: int, values: int, distance: float, factor: float) -> tuple[F32, F32, F32]:
    """A tensor, one at a distance and one `factor` times as far, in f32."""
    random = generator(seed, draw)
    a = random.standard_normal(values).astype(np.float32)
    aside = random.standard_normal(values)
    return a, _at(a, aside, distance), _at(a, aside, factor * distance)


def _at(a: F32, aside: np.ndarray[Any, np.dtype[np.float64]], distance: float) -> F32:
    """The tensor at ``1 - cosine = distance`` from a, of a's length, towards a direction."""
    exact = a.astype(np.float64)
    across = aside - exact * (np.sum(aside * exact) / np.sum(exact * exact))
    across *= np.sqrt(np.sum(exact * exact) / np.sum(across * across))
    cosine = 1.0 - distance
    turned: F32 = (cosine * exact + np.sqrt(distance * (2.0 - distance)) * across).astype(np.float32)
    return turned


def _metrics(drawn: Sequence[tuple[F32, F32, F32]], cosine: Cosine, resampling: Resampling) -> dict[str, Any]:
    near = [cosine(a, b) for a, b, _ in drawn]
    far = [cosine(a, c) for a, _, c in drawn]
    errors = [abs(1.0 - shown - exact_distance(a, b)) for shown, (a, b, _) in zip(near, drawn, strict=True)]
    hits = sum(x > y for x, y in zip(near, far, strict=True))
    return {
        "told_apart": share_with_interval(hits, len(drawn), resampling),
        "nearest": max(near),
        "farthest": min(near),
        "largest_error": rounded(max(errors) / _STEP),
    }


def _published(seed: int, values: int) -> dict[str, Any]:
    """The floor, and what pairs around it print."""
    a, near, far = _drawn(seed, 0, values, 2.0e-8, 1.05)
    apart = exact_distance(a, far) - exact_distance(a, near)
    return {
        "floor": float(np.float32(1.0) - np.float32(_STEP)),
        "floor_is_next_below_1": bool(np.nextafter(np.float32(1.0), np.float32(0.0)) == np.float32(FLOOR)),
        # A number prints as 1 up to half a step below it, and as the floor up to one and a half.
        "prints_1_below": _STEP / 2.0,
        "prints_floor_below": 1.5 * _STEP,
        "billionth": {
            "apart": rounded(apart),
            "first": printed_cosine(a, near),
            "second": printed_cosine(a, far),
            "first_f32": float32_cosine(a, near),
            "second_f32": float32_cosine(a, far),
        },
    }
