"""The real model's own layers, one after the other: how does the propagated error grow with depth?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from driftscope.falsifiers.reader import EvidenceReader
from driftscope.falsifiers.sampling import F64, Resampling, generator, parameter, rounded, with_interval

if TYPE_CHECKING:
    import polars as pl

_TABLE = "divergence.parquet"
_GAINS = (0.5, 0.8, 1.0, 1.2, 1.5)
_COMPOUNDING = 1.5
_SPREAD = 0.3
_SYNTHETIC_LAYERS, _SYNTHETIC_PROMPTS = 30, 8
_LEAST_LAYERS = 3


def inputs(parameters: Mapping[str, Any]) -> list[str]:
    """Name the evidence that is read: the propagated error of the traces."""
    return [_TABLE]


def measure(
    parameters: Mapping[str, Any],
    regimes: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    evidence: EvidenceReader,
) -> dict[str, Any]:
    """Follow the error between two paths of one pass through the layers of the model.

    Unlike in a chain of drawn matrices, every layer hands its output on, through the residual stream.

    Args:
        parameters: `tap`, whose error is followed, `resamples`, `confidence`.
        regimes: name to `pair` of paths and token `scope`.
        seeds: of the synthetic passes of controls and domain.
        evidence: the ``divergence`` table.

    Returns:
        In each regime, without unit: `exponent`, the slope of log error against log depth (the first layer
        has depth 1), averaged over prompts; `growth`, last layer over first, geometric mean over prompts;
        `drops`, the layers whose error is below that of the layer before, mean over prompts; each with its
        interval over prompts; `layers`, the error ``||A-B|| / ||A||`` by layer. `null` has the exponents of
        errors that are handed on as they are with an independent one of the same size added in each layer,
        and of errors in proportion to depth.
    """
    if not evidence.has(_TABLE):
        return {"status": "not-run", "reason": f"{_TABLE} is not there: no paths were compared"}
    tap = parameter(parameters, "tap", str)
    resampling = Resampling.of(parameters)
    table = evidence.table(_TABLE, "divergence")
    table = table.filter((table["tap"] == tap) & (table["layer"] >= 0))
    found, samples = {}, 0
    for name, regime in regimes.items():
        errors, layers, prompts = _errors(
            table, parameter(regime, "pair", str), parameter(regime, "scope", str)
        )
        if errors.shape[0] > 1 and errors.shape[1] >= _LEAST_LAYERS:
            found[name] = {**_metrics(errors, layers, resampling), "prompts": prompts}
            samples += errors.size

    if not found:
        return {
            "status": "not-run",
            "reason": f"fewer than {_LEAST_LAYERS} layers or two prompts were compared at {tap}",
        }

    def synthetic(gain: float) -> dict[str, Any]:
        errors = np.concatenate([_handed_on(gain, seed) for seed in seeds])
        return _metrics(errors, list(range(errors.shape[1])), resampling)

    return {
        "samples": samples,
        "tap": tap,
        "null": {"exponent_independent": 0.5, "exponent_proportional": 1.0},
        "regimes": found,
        "controls": {"compounding": synthetic(_COMPOUNDING), "quadrature": synthetic(1.0)},
        "domain": [synthetic(gain) for gain in _GAINS],
    }


def _errors(table: pl.DataFrame, pair: str, scope: str) -> tuple[F64, list[int], list[str]]:
    """Return ``float64[prompts, layers]``; layers without an error in some prompt are left out."""
    rows = table.filter((table["pair"] == pair) & (table["scope"] == scope))
    error = {
        (row["prompt"], row["layer"]): row["relative_l2"]
        for row in rows.select("prompt", "layer", "relative_l2").iter_rows(named=True)
    }
    prompts = sorted({prompt for prompt, _ in error})
    layers = sorted({layer for _, layer in error})
    values = np.array(
        [[error.get((prompt, layer)) for layer in layers] for prompt in prompts], np.float64
    ).reshape(len(prompts), len(layers))
    usable = np.all(np.isfinite(values) & (values > 0.0), axis=0)
    return values[:, usable], [layer for layer, keep in zip(layers, usable, strict=True) if keep], prompts


def _metrics(errors: F64, layers: Sequence[int], resampling: Resampling) -> dict[str, Any]:
    logs = np.log(errors)
    depth = np.log(np.array(layers, np.float64) + 1.0)
    depth -= depth.mean()
    slopes = (logs * depth).sum(axis=1) / np.square(depth).sum()
    growth = with_interval(_mean, logs[:, -1] - logs[:, 0], resampling)
    by_layer = []
    for index, layer in enumerate(layers):
        interval = with_interval(_mean, logs[:, index], resampling)
        by_layer.append({"layer": layer} | {end: rounded(np.exp(value)) for end, value in interval.items()})
    drops = (np.diff(errors, axis=1) < 0.0).sum(axis=1).astype(np.float64)
    return {
        "exponent": with_interval(_mean, slopes, resampling),
        "growth": {end: rounded(np.exp(value)) for end, value in growth.items()},
        "drops": with_interval(_mean, drops, resampling),
        "steps": len(layers) - 1,
        "layers": by_layer,
    }


def _mean(sample: F64) -> F64:
    mean: F64 = sample.mean(axis=1)
    return mean


def _handed_on(gain: float, seed: int) -> F64:
    """Passes in which each layer multiplies the error it is given and adds an independent one of size 1."""
    random = generator(seed)
    fresh = np.exp(_SPREAD * random.standard_normal((_SYNTHETIC_PROMPTS, _SYNTHETIC_LAYERS)))
    energy = np.empty_like(fresh)
    carried = np.zeros(_SYNTHETIC_PROMPTS)
    for layer in range(_SYNTHETIC_LAYERS):
        carried = gain**2 * carried + np.square(fresh[:, layer])
        energy[:, layer] = carried
    errors: F64 = np.sqrt(energy)
    return errors
