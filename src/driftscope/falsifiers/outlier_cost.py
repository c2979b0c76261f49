"""Rounded activations against rounded weights at the same site: which costs more, and where?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from driftscope.artifacts.model import Artifact
from driftscope.errors import InputError
from driftscope.falsifiers.outlier_step import block_size_of
from driftscope.falsifiers.own_activations import PROMPTS, own_activations
from driftscope.falsifiers.reader import EvidenceReader
from driftscope.falsifiers.sampling import F64, Resampling, generator, parameter, rounded, with_interval
from driftscope.falsifiers.super_block import F32
from driftscope.forward.architecture import site_tensor
from driftscope.forward.policy import LAYER_SITES
from driftscope.kernels.activations import quantize_activation
from driftscope.kernels.dequantize import dequantize
from driftscope.kernels.matmul import matmul_f32

_TEACHER, _CANDIDATE = "models/teacher.json", "models/candidate.json"
_PATH = "teacher.f32"
_WIDEST = 256
_CLASSES = ("outlier", "calm")
_DOMAIN_GAINS = (1.0, 3.0, 10.0, 30.0, 100.0)
_WEIGHT_ERROR = 0.05
_PLANTED_GAIN = 100.0
_SYNTHETIC_SITES, _SYNTHETIC_TOKENS, _SYNTHETIC_ROWS = 8, 8, 64
_FLOOR = 1e-30


@dataclass(frozen=True)
class Site:
    """What a matmul is given and by what it multiplies.

    Attributes:
        layer: layer number.
        name: q, k, v, o, gate, up or down.
        x: ``float32[tokens, k]``.
        exact: ``float32[rows, k]``, the teacher's weights.
        quantized: ``float32[rows, k]``, the candidate's.
    """

    layer: int
    name: str
    x: F32
    exact: F32
    quantized: F32


def inputs(parameters: Mapping[str, Any]) -> list[str]:
    """Name the evidence that is read: both models and the prompts of the activations."""
    return [_TEACHER, _CANDIDATE, PROMPTS]


def measure(
    parameters: Mapping[str, Any],
    regimes: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    evidence: EvidenceReader,
) -> dict[str, Any]:
    """Compare the output error of rounding a site's activation with that of rounding its weights.

    Activations are the teacher's own. At every site the tokens are ordered by the error that the largest
    values of their blocks predict; the first and the last quarter are the outlier and the calm tokens.

    Args:
        parameters: `rows` of each weight at most (in even steps), `most_tokens` of each prompt,
            `resamples`, `confidence`.
        regimes: name to activation `format`, `tokens` (``outlier`` or ``calm``) and `site` (``all``, or one
            of q, k, v, o, gate, up, down).
        seeds: of the synthetic sites of controls and domain.
        evidence: teacher, candidate, prompts.

    Returns:
        In each regime, without unit: `activation_over_weight`, ``||W q(x) - W x||`` over
        ``||W x - W' x||``, W the candidate's weights and W' the teacher's, median over the regime's tokens at
        a site, geometric mean over sites (bootstrap over layers); `excess`, the first of the two over what
        the steps of the blocks predict; `by_site`, the ratio of each kind of site; `sites_above_one`, the
        share of sites where the activation costs more. `sites_not_finite` counts sites that are left out
        because a weight or an activation is NaN or infinite. `widths` is the error of each format over that
        of the narrowest block of the regimes, as measured and as predicted.
    """
    for name in (_TEACHER, _CANDIDATE):
        if not evidence.has(name):
            return {"status": "not-run", "reason": f"{name} is not there"}
    rows = parameter(parameters, "rows", int, least=1)
    most_tokens = parameter(parameters, "most_tokens", int, least=1)
    resampling = Resampling.of(parameters)
    asked = {}
    for name, regime in regimes.items():
        fmt, kind, site = (parameter(regime, key, str) for key in ("format", "tokens", "site"))
        for key, value, known in (("tokens", kind, _CLASSES), ("site", site, ("all", *LAYER_SITES))):
            if value not in known:
                raise InputError(
                    f"measurement parameter `{key}` is {value!r}; expected one of {', '.join(known)}"
                )
        asked[name] = fmt, kind, site
    teacher, candidate = evidence.model(_TEACHER), evidence.model(_CANDIDATE)
    own = own_activations(teacher, _PATH, evidence.document(PROMPTS), most_tokens=most_tokens)
    formats = sorted({fmt for fmt, _, _ in asked.values()})
    by_format: dict[str, list[dict[str, Any]]] = {fmt: [] for fmt in formats}
    left_out = 0
    for place in _sites(teacher, candidate, own.at, rows):
        weight = _energy(place.x, place.quantized - place.exact)
        if not np.isfinite(weight).all():
            left_out += 1
            continue
        for fmt in formats:
            by_format[fmt].append(_cost(place, fmt, weight))
    if not by_format[formats[0]]:
        return {"status": "not-run", "reason": f"no site has finite rows of {_WIDEST} values"}
    return {
        "samples": sum(len(costs[0]["ratio"]) * len(costs) for costs in by_format.values()),
        "tokens": len(own.position),
        "sites": len(by_format[formats[0]]),
        "sites_not_finite": left_out,
        "weight_error": _weight_error(by_format[formats[0]], resampling),
        "regimes": {
            name: _metrics(_at(site, by_format[fmt]), kind, resampling)
            for name, (fmt, kind, site) in asked.items()
            if _at(site, by_format[fmt])
        },
        "widths": _widths(by_format),
        "controls": {
            "planted": _synthetic(_PLANTED_GAIN, seeds, resampling),
            "plain": _synthetic(1.0, seeds, resampling),
        },
        "domain": [_synthetic(gain, seeds, resampling) for gain in _DOMAIN_GAINS],
    }


def _at(site: str, costs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [cost for cost in costs if site in ("all", cost["site"])]


def _sites(teacher: Artifact, candidate: Artifact, activation: Any, most_rows: int) -> Iterator[Site]:
    """Yield every site whose rows hold a run of 256; columns are cut to whole runs."""
    for layer in range(teacher.config.num_layers):
        for name in LAYER_SITES:
            x = activation(layer, name)
            width = x.shape[1] // _WIDEST * _WIDEST
            if width:
                weights = [_rows(model, layer, name, most_rows)[:, :width] for model in (teacher, candidate)]
                yield Site(layer, name, x[:, :width], *weights)


def _rows(model: Artifact, layer: int, site: str, most: int) -> F32:
    """Return some rows of a weight in canonical order, the same of both models."""
    ref = model.tensors[site_tensor(model.config, layer, site)]
    kept = min(ref.n_rows, most)
    chosen = np.arange(kept) * ref.n_rows // kept
    order = ref.row_order()
    stored = chosen if order is None else order[chosen]
    return dequantize(np.ascontiguousarray(ref.raw()[stored]), ref.dtype)


def _energy(x: F32, w: F32) -> F64:
    """Energy over outputs of ``x`` times ``w``: ``float64[tokens]``."""
    product = matmul_f32(np.ascontiguousarray(x), np.ascontiguousarray(w)).astype(np.float64)
    energy: F64 = np.square(product).sum(axis=1)
    return energy


def _cost(site: Site, fmt: str, weight: F64) -> dict[str, Any]:
    """Compare both errors at one site, token by token."""
    size = block_size_of(fmt)
    x = np.ascontiguousarray(site.x)
    error = quantize_activation(x, fmt).dequantize() - x
    activation = _energy(error, site.quantized)
    blocks = np.abs(x.astype(np.float64)).reshape(len(x), -1, size)
    steps = np.square(blocks.max(axis=2) / 127.0) / 12.0
    columns = np.square(site.quantized.astype(np.float64)).sum(axis=0).reshape(-1, size).sum(axis=1)
    predicted = (steps * columns).sum(axis=1)
    relative = steps.sum(axis=1) * size / np.maximum(np.square(blocks).sum(axis=(1, 2)), _FLOOR)
    order = np.argsort(-relative, kind="stable")
    quarter = max(1, len(order) // 4)
    return {
        "layer": site.layer,
        "site": site.name,
        "ratio": np.sqrt(np.maximum(activation, _FLOOR) / np.maximum(weight, _FLOOR)),
        "activation": activation,
        "predicted": predicted,
        "relative_weight": np.sqrt(np.maximum(weight, _FLOOR) / np.maximum(_energy(x, site.exact), _FLOOR)),
        "outlier": order[:quarter],
        "calm": order[-quarter:],
    }


def _metrics(costs: Sequence[Mapping[str, Any]], kind: str, resampling: Resampling) -> dict[str, Any]:
    ratios = np.array([np.median(cost["ratio"][cost[kind]]) for cost in costs])
    excess = np.array(
        [
            np.median(cost["activation"][cost[kind]] / np.maximum(cost["predicted"][cost[kind]], _FLOOR))
            for cost in costs
        ]
    )
    layers = [cost["layer"] for cost in costs]
    sites = [cost["site"] for cost in costs]
    return {
        "activation_over_weight": _by_layer(np.log(ratios), layers, resampling),
        "excess": _by_layer(0.5 * np.log(np.maximum(excess, _FLOOR)), layers, resampling),
        "sites_above_one": rounded(float((ratios > 1.0).mean())),
        "by_site": {
            site: rounded(_geometric([r for r, name in zip(ratios, sites, strict=True) if name == site]))
            for site in sorted(set(sites))
        },
    }


def _geometric(values: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(np.maximum(values, _FLOOR)))))


def _weight_error(costs: Sequence[Mapping[str, Any]], resampling: Resampling) -> dict[str, float]:
    """The relative output error of rounding the weights, median over tokens, geometric mean over sites."""
    logs = np.log([np.median(cost["relative_weight"]) for cost in costs])
    return _by_layer(logs, [cost["layer"] for cost in costs], resampling)


def _widths(by_format: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Each format's error over that of the narrowest one: median over tokens, geometric mean over sites."""
    narrowest = min(by_format, key=lambda fmt: (block_size_of(fmt), fmt))
    found: dict[str, Any] = {"narrowest": narrowest}
    for fmt, costs in by_format.items():
        found[fmt] = {}
        for key, field in (("measured", "activation"), ("predicted", "predicted")):
            quotients = [
                float(np.median(wide[field] / np.maximum(narrow[field], _FLOOR)))
                for wide, narrow in zip(costs, by_format[narrowest], strict=True)
            ]
            found[fmt][key] = rounded(np.sqrt(_geometric(quotients)))
    return found


def _by_layer(logs: F64, layers: Sequence[int], resampling: Resampling) -> dict[str, float]:
    """Geometric mean with an interval; the sites of a layer are one cluster."""
    numbers = np.array(layers)
    clusters = np.array(
        [[(numbers == layer).sum(), logs[numbers == layer].sum()] for layer in np.unique(numbers)]
    )
    interval = with_interval(_mean_of_clusters, clusters, resampling)
    return {end: rounded(np.exp(value)) for end, value in interval.items()}


def _mean_of_clusters(sample: F64) -> F64:
    totals = sample.sum(axis=1)
    mean: F64 = totals[:, 1] / totals[:, 0]
    return mean


def _synthetic(gain: float, seeds: Sequence[int], resampling: Resampling) -> dict[str, Any]:
    """Normal activations, one channel `gain` times as large, and normal weights that err by a twentieth."""
    costs = []
    for index, seed in enumerate(seeds):
        for number in range(_SYNTHETIC_SITES):
            random = generator(seed, number)
            x = random.standard_normal((_SYNTHETIC_TOKENS, _WIDEST)).astype(np.float32)
            x[:, 5] *= np.float32(gain)
            exact = random.standard_normal((_SYNTHETIC_ROWS, _WIDEST)).astype(np.float32)
            # The outlier's own column is exact, or its rounding would outweigh all else.
            noise = _WEIGHT_ERROR * random.standard_normal(exact.shape)
            noise[:, 5] = 0.0
            site = Site(
                index * _SYNTHETIC_SITES + number, "synthetic", x, exact, exact + noise.astype(np.float32)
            )
            costs.append(_cost(site, "q8_K", _energy(x, site.quantized - site.exact)))
    return _metrics(costs, "outlier", resampling)
