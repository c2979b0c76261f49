"""Several matrices in a row, path A against path B: does the error grow faster than the depth?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from driftscope.errors import InputError
from driftscope.falsifiers.reader import EvidenceReader
from driftscope.falsifiers.sampling import F64, Resampling, generator, parameter, rounded, with_interval
from driftscope.falsifiers.super_block import F32, Rows, gaussian_rows, path_a, path_b, random_rows
from driftscope.kernels.reference import published

PUBLISHED_DEPTH = 5
_GAINS = (0.5, 0.8, 1.0, 1.25, 1.5)
_COMPOUNDING = 1.5
_CONTROL_SEEDS = 4
_NULL_ERROR = 0.005
_FLOOR = 1e-9

Chain = list[Rows]
Step = Callable[[Rows, F32, F32, np.random.Generator], F32]


def inputs(parameters: Mapping[str, Any]) -> list[str]:
    """Name the evidence that is read: none, matrices and activations are drawn."""
    return []


def measure(
    parameters: Mapping[str, Any],
    regimes: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    evidence: EvidenceReader,
) -> dict[str, Any]:
    """Follow the error of path B against path A through chains of 256 x 256 Q4_K matrices.

    After each matrix the vector is divided by its root mean square, each path by its own. The error at a
    depth is ``||A-B|| / ||A||``, the same metric at every depth.

    Args:
        parameters: `depth` (matrices in a chain), `activations` (drawn for each seed), `resamples`,
            `confidence`.
        regimes: name to `matrices` (``published``, ``random`` or ``gaussian``) and `activation_format`.
        seeds: each draws a chain (``published``: its one chain) and standard normal activations.
        evidence: not read.

    Returns:
        In each regime, without unit: `exponent`, the slope of log error against log depth, averaged over
        chains and activations (1: in proportion to the depth, 0.5: independent errors adding in
        quadrature); `growth`, error at depth five over error at depth one, geometric mean;
        `growth_to_end`, the same of the last depth; `error`, the median at each depth.
    """
    depth = parameter(parameters, "depth", int, least=PUBLISHED_DEPTH)
    activations = parameter(parameters, "activations", int, least=1)
    resampling = Resampling.of(parameters)

    def follow(matrices: str, step: Step, chosen: Sequence[int]) -> dict[str, Any]:
        errors = [
            _errors(
                _chain(matrices, seed, depth),
                generator(seed, 1).standard_normal((activations, published.VALUES)).astype(np.float32),
                step,
                generator(seed, 2),
            )
            for seed in chosen
        ]
        return _metrics(np.stack(errors), resampling)

    few = seeds[:_CONTROL_SEEDS]
    return {
        "samples": depth * activations * len(seeds) * len(regimes),
        "published": _published(depth),
        "null": {"exponent": 0.5, "growth": rounded(np.sqrt(PUBLISHED_DEPTH))},
        "regimes": {
            name: follow(
                parameter(regime, "matrices", str),
                _rounding(parameter(regime, "activation_format", str), 1.0),
                seeds,
            )
            for name, regime in regimes.items()
        },
        "controls": {
            "compounding": follow("gaussian", _rounding("q8_K", _COMPOUNDING), few),
            "quadrature": follow("gaussian", _independent, few),
        },
        # The null model is in it whatever state path B is in.
        "domain": [
            follow("gaussian", _independent, few[:2]),
            *(follow("gaussian", _rounding("q8_K", gain), few) for gain in _GAINS),
        ],
    }


def _chain(matrices: str, seed: int, depth: int) -> Chain:
    if matrices == "published":
        return [published.chained_tensor(step) for step in range(depth)]
    draws = {"random": random_rows, "gaussian": gaussian_rows}
    if matrices not in draws:
        known = ", ".join(["published", *sorted(draws)])
        raise InputError(f"measurement parameter `matrices` is {matrices!r}; expected one of {known}")
    random = generator(seed, 0)
    return [draws[matrices](random, published.CHAIN_ROWS) for _ in range(depth)]


def _rounding(activation: str, gain: float) -> Step:
    """Path B; with a gain other than 1 its error grows by that factor in every step."""

    def step(rows: Rows, a: F32, b: F32, random: np.random.Generator) -> F32:
        product = path_b(rows, b, activation)
        if gain == 1.0:
            return product
        exact = path_a(rows, a)
        return exact + np.float32(gain) * (product - exact)

    return step


def _independent(rows: Rows, a: F32, b: F32, random: np.random.Generator) -> F32:
    """The null model: path A again, with an error of its own size and direction in every step."""
    product = path_a(rows, b)
    size = np.sqrt(np.square(product.astype(np.float64)).mean(axis=1, keepdims=True))
    noise = _NULL_ERROR * size * random.standard_normal(product.shape)
    return product + noise.astype(np.float32)


def _errors(chain: Chain, start: F32, step: Step, random: np.random.Generator) -> F64:
    """Return ``f64[n, depth]``, the relative error of each activation after each matrix."""
    a = b = start
    errors = []
    for rows in chain:
        following = step(rows, a, b, random)
        a, b = normalized(path_a(rows, a)), normalized(following)
        errors.append(relative_error(a, b))
    return np.stack(errors, axis=1)


def normalized(x: F32) -> F32:
    """Divide each row by its root mean square (floor 1e-9), squares summed in order in f32."""
    total = np.zeros((x.shape[0], 1), np.float32)
    for k in range(x.shape[1]):
        total += x[:, k, None] * x[:, k, None]
    return x / np.maximum(np.sqrt(total / np.float32(x.shape[1])), np.float32(_FLOOR))


def relative_error(a: F32, b: F32) -> F64:
    """``||A-B|| / max(||A||, 1e-9)`` of each row, in f64."""
    exact = a.astype(np.float64)
    error = np.sqrt(np.square(exact - b).sum(axis=1))
    size: F64 = np.maximum(np.sqrt(np.square(exact).sum(axis=1)), _FLOOR)
    return error / size


def _metrics(errors: F64, resampling: Resampling) -> dict[str, Any]:
    """Summarise ``f64[n_seeds, n_activations, depth]``; seeds are the clusters of the bootstrap."""
    depth = errors.shape[2]
    if not np.all(errors > 0.0):
        return {"error": [rounded(value) for value in np.median(errors, axis=(0, 1))]}
    logs = np.log(errors)
    abscissa = np.log(np.arange(1, depth + 1))
    abscissa -= abscissa.mean()
    slopes = (logs * abscissa).sum(axis=2) / np.square(abscissa).sum()
    return {
        "exponent": with_interval(_mean, slopes, resampling),
        "growth": _as_factor(logs[:, :, PUBLISHED_DEPTH - 1] - logs[:, :, 0], resampling),
        "growth_to_end": _as_factor(logs[:, :, -1] - logs[:, :, 0], resampling),
        "error": [rounded(value) for value in np.median(errors, axis=(0, 1))],
    }


def _mean(sample: F64) -> F64:
    flat: F64 = sample.reshape(sample.shape[0], -1).mean(axis=1)
    return flat


def _as_factor(logs: F64, resampling: Resampling) -> dict[str, float]:
    interval = with_interval(_mean, logs, resampling)
    return {end: rounded(np.exp(value)) for end, value in interval.items()}


def _published(depth: int) -> dict[str, Any]:
    """Return the published chain by depth, and its amplification in one metric and in two."""
    block, ramp = published.block_bytes(), published.activation()
    scalar = published.relative_difference(
        float(published.path_a_dot(block, ramp)), float(published.path_b_dot(block, ramp))
    )
    a = b = ramp
    errors = np.empty(depth)
    for step, rows in enumerate(_chain("published", 0, depth)):
        a = published.normalize(published.path_a_matmul(rows, a))
        b = published.normalize(published.path_b_matmul(rows, b))
        errors[step] = relative_error(a[None], b[None])[0]
    ends = [
        np.stack([published.chain(product, token) for token in range(published.TOKENS)])
        for product in (published.path_a_matmul, published.path_b_matmul)
    ]
    tokens = [published.vector_difference(a, b) for a, b in zip(*ends, strict=True)]
    return {
        "tokens_percent": {f"token_{token}": rounded(100.0 * error) for token, error in enumerate(tokens)},
        "tokens_mean_percent": rounded(float(100.0 * np.mean(tokens))),
        "tokens_largest_over_smallest": rounded(max(tokens) / min(tokens)),
        "tokens_mean_over_first": rounded(float(np.mean(tokens) / tokens[0])),
        **{
            f"tokens_std_{path}": rounded(end.astype(np.float64).std(axis=0).mean())
            for path, end in zip("ab", ends, strict=True)
        },
        "depth": depth,
        "scalar_percent": rounded(100.0 * scalar),
        "vector_percent": [rounded(100.0 * error) for error in errors],
        "after_one_percent": rounded(100.0 * errors[0]),
        "after_five_percent": rounded(100.0 * errors[PUBLISHED_DEPTH - 1]),
        "at_end_percent": rounded(100.0 * errors[-1]),
        "largest_percent": rounded(100.0 * errors.max()),
        "largest_depth": int(errors.argmax()) + 1,
        "amplification_mixed": rounded(errors[PUBLISHED_DEPTH - 1] / scalar),
        "amplification_vector": rounded(errors[PUBLISHED_DEPTH - 1] / errors[0]),
        "amplification_vector_by_depth": [rounded(error / errors[0]) for error in errors],
    }
