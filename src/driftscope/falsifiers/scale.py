"""The scale of a block: does it move the relative difference of the two paths?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from driftscope.errors import InputError
from driftscope.falsifiers.reader import EvidenceReader
from driftscope.falsifiers.sampling import F64, Resampling, generator, parameter, rounded, with_interval
from driftscope.falsifiers.super_block import F32, VALUES, Rows, path_a, path_b, random_rows
from driftscope.kernels.activations import QuantizedActivation, quantize_activation
from driftscope.kernels.dequantize import dequantize
from driftscope.kernels.reference import published

_MINIMA = ("none", "proportional", "fixed")
_MINIMUM_OVER_SCALE = 7.5
_FIXED_MINIMUM = 0.25
_OTHER_SCALE = 0.1
_POWERS = (0.0625, 0.25, 1.0, 4.0, 16.0)
_CONSTANT_ERRORS = (0.0, 0.01, 1.0, 100.0)


Product = Callable[[Rows, F32], F32]


def inputs(parameters: Mapping[str, Any]) -> list[str]:
    """Name the evidence that is read: none, blocks and activations are drawn."""
    return []


def measure(
    parameters: Mapping[str, Any],
    regimes: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    evidence: EvidenceReader,
) -> dict[str, Any]:
    """Sweep the scale of the first block of rows and compare the paths at each scale.

    Args:
        parameters: `rows`, `activations` drawn for each seed, `scales` that are swept, `activation_format`
            (``apr_q8k`` or ``q8_K``), `resamples`, `confidence`.
        regimes: name to `minima` (``none``, ``proportional`` to the scale, or ``fixed``), `blocks` of a row,
            of which the first has the scale that is swept, `mean` of the normal activations, and
            `outlier_gain` of one channel of the first block (1 for none).
        seeds: one draw each.
        evidence: not read.

    Returns:
        In each regime, without unit: `factor`, the largest over the smallest relative difference
        ``||A-B|| / ||A||`` over the scales, all rows and activations together; `predicted`, the same of
        what the rounding of the activation predicts; `percent`, the relative difference at each scale.
    """
    n_rows = parameter(parameters, "rows", int, least=2)
    activations = parameter(parameters, "activations", int, least=2)
    activation_format = parameter(parameters, "activation_format", str)
    resampling = Resampling.of(parameters)
    scales = _scales(parameters)

    def sweep(regime: Mapping[str, Any], swept: Sequence[float], error: float = 0.0) -> dict[str, Any]:
        case = _Case(regime, n_rows, activations, activation_format)
        energies = np.stack([case.energies(seed, swept, error) for seed in seeds])
        return _metrics(energies, resampling)

    alone = {"minima": "none", "blocks": 1, "mean": 0.0, "outlier_gain": 1.0}
    return {
        "samples": n_rows * activations * len(seeds) * len(scales) * len(regimes),
        "scales": list(scales),
        "published": _published(),
        "regimes": {name: sweep(regime, scales) for name, regime in regimes.items()},
        "controls": {
            "constant-error": sweep(alone, scales, error=1.0),
            "powers-of-two": sweep(alone, _POWERS),
        },
        "domain": [
            sweep(alone, _POWERS),
            *(sweep(alone, scales, error=error) for error in _CONSTANT_ERRORS),
            *(sweep({**alone, "minima": minima, "mean": 3.0}, scales) for minima in _MINIMA),
        ],
    }


def _scales(parameters: Mapping[str, Any]) -> tuple[float, ...]:
    scales = parameters.get("scales")
    positive = isinstance(scales, list) and all(
        isinstance(scale, int | float) and not isinstance(scale, bool) and 1e-4 <= scale <= 1e3
        for scale in scales
    )
    if not isinstance(scales, list) or not positive or len(scales) < 2:
        raise InputError(
            f"measurement parameter `scales` is {scales!r}; expected two or more numbers from 0.0001 to 1000"
        )
    return tuple(float(scale) for scale in scales)


class _Case:
    """Rows and activations of one regime."""

    def __init__(
        self, regime: Mapping[str, Any], n_rows: int, activations: int, activation_format: str
    ) -> None:
        self.minima = parameter(regime, "minima", str)
        if self.minima not in _MINIMA:
            raise InputError(
                f"regime parameter `minima` is {self.minima!r}; expected one of {', '.join(_MINIMA)}"
            )
        self.blocks = parameter(regime, "blocks", int, least=1)
        self.mean = parameter(regime, "mean", float)
        self.gain = parameter(regime, "outlier_gain", float, least=0.0)
        self.n_rows, self.activations, self.format = n_rows, activations, activation_format

    def energies(self, seed: int, scales: Sequence[float], constant_error: float) -> F64:
        """Energies of difference, path A and prediction at each scale: ``f64[n_scales, 3]``."""
        random = generator(seed)
        drawn = [random_rows(random, self.n_rows) for _ in range(self.blocks)]
        x = self.mean + random.standard_normal((self.activations, VALUES * self.blocks))
        x[:, random.integers(0, VALUES)] *= self.gain
        values = x.astype(np.float32)
        quantized = quantize_activation(values, self.format)
        if not isinstance(quantized, QuantizedActivation) or quantized.block_size != VALUES:
            raise InputError(f"activation format {self.format!r} has no blocks of {VALUES}")
        steps = np.square(quantized.d.astype(np.float64)).sum(axis=0) / 12.0
        energies = []
        for scale in scales:
            blocks = [self._scaled(block, scale, at) for at, block in enumerate(drawn)]
            rows = np.concatenate(blocks, axis=1)
            a = path_a(rows, values).astype(np.float64)
            difference = a - path_b(rows, values, self.format) + constant_error
            weights = np.square(dequantize(rows, "Q4_K").astype(np.float64)).sum(axis=0)
            predicted = (steps * weights.reshape(self.blocks, VALUES).sum(axis=1)).sum()
            energies.append([np.square(difference).sum(), np.square(a).sum(), predicted])
        return np.array(energies)

    def _scaled(self, block: Rows, scale: float, at: int) -> Rows:
        own = scale if at == 0 else _OTHER_SCALE
        minimum = {"none": 0.0, "proportional": _MINIMUM_OVER_SCALE * own, "fixed": _FIXED_MINIMUM}
        scaled = block.copy()
        scaled[:, :4] = np.array([own, minimum[self.minima]], np.float16).view(np.uint8)
        return scaled


def _metrics(energies: F64, resampling: Resampling) -> dict[str, Any]:
    """Summarise ``f64[n_seeds, n_scales, 3]``; seeds are the clusters of the bootstrap."""
    totals = energies.sum(axis=0)
    return {
        "factor": with_interval(lambda sample: _factor(sample, 0), energies, resampling),
        "predicted": rounded(float(_factor(energies[None], 2)[0])),
        "percent": [rounded(100.0 * np.sqrt(total[0] / total[1])) for total in totals],
    }


def _factor(sample: F64, energy: int) -> F64:
    totals = sample.sum(axis=1)
    relative = np.sqrt(totals[:, :, energy] / totals[:, :, 1])
    factor: F64 = relative.max(axis=1) / np.maximum(relative.min(axis=1), 1e-12)
    return factor


def _published() -> dict[str, Any]:
    """Return the published sweep, in both orders of summing, and what its bytes decode to."""
    x = published.activation()
    fixture, percents, stated_percents = [], [], []
    for name, stored in published.D_SCALES.items():
        named = float(name)
        block = published.block_bytes(d=stored, dmin=b"\x00\x00")
        a = published.path_a_dot(block, x)
        b, stated = published.path_b_dot(block, x), published.path_b_stated_matmul(block[None], x)[0]
        decoded = float(np.frombuffer(stored, "<f2")[0])
        percents.append(rounded(100.0 * published.relative_difference(float(a), float(b))))
        stated_percents.append(rounded(100.0 * published.relative_difference(float(a), float(stated))))
        fixture.append(
            {
                "named": named,
                "bytes": stored.hex(" "),
                "decoded": rounded(decoded),
                "nearest_f16": rounded(float(np.float16(named))),
                "off_percent": rounded(100.0 * (decoded / named - 1.0)),
                "percent": percents[-1],
            }
        )
    wrong = [entry["named"] for entry in fixture if entry["decoded"] != entry["nearest_f16"]]
    return {
        "fixture": fixture,
        "wrong_bytes": wrong,
        "right_bytes": len(fixture) - len(wrong),
        "percents": percents,
        "percents_in_stated_order": stated_percents,
        "factor": rounded(max(percents) / min(percents)),
        "exact_percent": rounded(_exact_percent(x)),
    }


def _exact_percent(x: F32) -> float:
    """The figure of every scale if nothing but the activation were rounded."""
    weights = dequantize(published.block_bytes(dmin=b"\x00\x00")[None], "Q4_K")[0].astype(np.float64)
    q8, s8 = published.quantize_apr_q8k(x)
    a = (weights * x.astype(np.float64)).sum()
    b = (weights * q8[0]).sum() * float(s8[0])
    return 100.0 * abs(a - b) / abs(a)
