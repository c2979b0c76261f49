"""One Q4_K super-block, path A against path B: is the difference the rounding of the activation?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from driftscope.falsifiers.reader import EvidenceReader
from driftscope.falsifiers.sampling import F64, Resampling, generator, parameter, rounded, with_interval
from driftscope.falsifiers.super_block import (
    F32,
    Rows,
    path_a,
    path_a_reversed,
    path_b,
    predicted_energy,
    random_rows,
    swapped_nibbles,
)
from driftscope.kernels.reference import published

_SWAPPED_SHARES = (0.0, 0.001, 0.01, 0.1, 1.0)
_NOISE_LEVELS = (0.0, 0.01, 0.1, 1.0, 10.0)
_FLOOR = 1e-9
_DRAWN_DOTS = 10_000

Product = Callable[[Rows, F32], F32]


@dataclass(frozen=True)
class _Draw:
    """Blocks, ``uint8[r, 144]``, and activations, ``f32[n, 256]``, that are all combined."""

    rows: Rows
    x: F32


def inputs(parameters: Mapping[str, Any]) -> list[str]:
    """Name the evidence that is read: none, blocks and activations are drawn."""
    return []


def measure(
    parameters: Mapping[str, Any],
    regimes: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    evidence: EvidenceReader,
) -> dict[str, Any]:
    """Compare the paths on many drawn blocks and activations, and on the published block.

    Args:
        parameters: `rows` and `activations` drawn for each seed, `resamples`, `confidence`.
        regimes: name to `activation_format` (``apr_q8k`` or ``q8_K``) and `outlier_gain`: one channel of
            each standard normal activation is that many times as large (1 for none).
        seeds: one draw each.
        evidence: not read.

    Returns:
        In each regime, all without unit: `excess`, the rms of the difference over what the rounding of the
        activation predicts; `vector`, ``||A-B|| / ||A||`` over the blocks of a draw, median over
        activations; `scalar`, ``|A-B| / |A|`` of one block, as quantiles over blocks and activations;
        `scalar_over_published`, its median over the published block's figure; `scalar_spread`, its 90th
        over its 10th percentile.
    """
    n_rows = parameter(parameters, "rows", int, least=2)
    n_activations = parameter(parameters, "activations", int, least=2)
    resampling = Resampling.of(parameters)
    block, ramp = published.block_bytes(), published.activation()
    a, b = published.path_a_dot(block, ramp), published.path_b_dot(block, ramp)
    reference = published.relative_difference(float(a), float(b))

    def compare(draws: Sequence[_Draw], activation: str, product: Product) -> dict[str, Any]:
        return _compare(draws, activation, product, reference, resampling)

    drawn = {
        name: [
            _draw(seed, n_rows, n_activations, parameter(regime, "outlier_gain", float, least=0.0))
            for seed in seeds
        ]
        for name, regime in regimes.items()
    }
    formats = {name: parameter(regime, "activation_format", str) for name, regime in regimes.items()}
    plain = [_draw(seed, n_rows, n_activations, 1.0) for seed in seeds]
    return {
        "samples": n_rows * n_activations * len(seeds) * len(regimes),
        "published": {
            "a": float(a),
            "b": float(b),
            "a_bits": _bits(a),
            "b_bits": _bits(b),
            "relative_difference_percent": 100.0 * reference,
            **_published_dot(seeds[0]),
        },
        "regimes": {
            name: compare(draws, formats[name], _path_b(formats[name])) for name, draws in drawn.items()
        },
        "controls": {
            "swapped-nibbles": compare(plain, "q8_K", _path_b_swapped("q8_K", 1.0)),
            "other-order": compare(plain, "q8_K", path_a_reversed),
            "same-block-other-scale": compare([_scaled_ramps(ramp)], "apr_q8k", _path_b("apr_q8k")),
        },
        # From no error at all, whatever state path B is in, to a gross one.
        "domain": [
            compare(plain[:1], "q8_K", path_a_reversed),
            *(compare(plain[:1], "q8_K", _path_b_swapped("q8_K", share)) for share in _SWAPPED_SHARES),
            *(
                compare([_noisy_ramps(ramp, seeds[0], level)], "apr_q8k", _path_b("apr_q8k"))
                for level in _NOISE_LEVELS
            ),
        ],
    }


def _published_dot(seed: int) -> dict[str, Any]:
    """The scalar and the SIMD dot of the published input, and how often they agree on drawn ones."""
    factors = published.dot_factors()
    drawn = generator(seed, 2).standard_normal((2, _DRAWN_DOTS, len(factors[0]))).astype(np.float32)
    equal = published.scalar_dot(*drawn) == published.simd_dot(*drawn)
    return {
        "scalar_dot_bits": _bits(np.float32(published.scalar_dot(*factors))),
        "simd_dot_bits": _bits(np.float32(published.simd_dot(*factors))),
        "drawn_dots": _DRAWN_DOTS,
        "drawn_dots_equal_percent": 100.0 * float(equal.mean()),
    }


def _path_b(activation: str) -> Product:
    return lambda rows, x: path_b(rows, x, activation)


def _path_b_swapped(activation: str, share: float) -> Product:
    """Path B with the nibbles of the first `share` of the blocks exchanged."""

    def product(rows: Rows, x: F32) -> F32:
        broken = rows.copy()
        count = int(np.ceil(share * len(rows)))
        broken[:count] = swapped_nibbles(rows[:count])
        return path_b(broken, x, activation)

    return product


def _draw(seed: int, n_rows: int, n_activations: int, outlier_gain: float) -> _Draw:
    random = generator(seed)
    rows = random_rows(random, n_rows)
    x = random.standard_normal((n_activations, published.VALUES))
    x[:, random.integers(0, published.VALUES)] *= outlier_gain
    return _Draw(rows, x.astype(np.float32))


def _scaled_ramps(ramp: F32) -> _Draw:
    """The published block and activation at several powers of two: the relative error cannot change."""
    powers = np.exp2(np.arange(-8, 8)).astype(np.float32)
    return _Draw(published.block_bytes()[None], powers[:, None] * ramp[None])


def _noisy_ramps(ramp: F32, seed: int, level: float) -> _Draw:
    noise = generator(seed, 1).standard_normal((16, published.VALUES)).astype(np.float32)
    return _Draw(published.block_bytes()[None], ramp[None] + np.float32(level) * noise)


def _compare(
    draws: Sequence[_Draw], activation: str, product: Product, reference: float, resampling: Resampling
) -> dict[str, Any]:
    """Compare path A with `product` over draws; activations are the clusters of the bootstrap."""
    energies, vectors, scalars = [], [], []
    for draw in draws:
        a = path_a(draw.rows, draw.x).astype(np.float64)
        difference = a - product(draw.rows, draw.x).astype(np.float64)
        energy = np.square(difference).sum(axis=1)
        energies.append(np.stack([energy, predicted_energy(draw.rows, draw.x, activation)], axis=1))
        vectors.append(np.sqrt(energy) / np.maximum(np.sqrt(np.square(a).sum(axis=1)), _FLOOR))
        scalars.append(np.abs(difference) / np.maximum(np.abs(a), _FLOOR))
    scalar = np.concatenate(scalars)
    p10, p50, p90 = (rounded(value) for value in np.quantile(scalar, [0.1, 0.5, 0.9]))
    return {
        "excess": with_interval(_root_of_ratio, np.concatenate(energies), resampling),
        "vector": with_interval(_median, np.concatenate(vectors), resampling),
        "scalar": {"p10": p10, "median": p50, "p90": p90, "largest": rounded(scalar.max())},
        "scalar_over_published": with_interval(_median, scalar / reference, resampling),
        "scalar_spread": rounded(p90 / p10) if p10 > 0 else None,
    }


def _root_of_ratio(sample: F64) -> F64:
    """Square root of total measured over total predicted energy."""
    totals = sample.sum(axis=1)
    root: F64 = np.sqrt(totals[:, 0] / totals[:, 1])
    return root


def _median(sample: F64) -> F64:
    flat = sample.reshape(sample.shape[0], -1)
    return np.median(flat, axis=1)


def _bits(value: np.float32) -> str:
    return f"0x{int(np.float32(value).view(np.uint32)):08x}"
