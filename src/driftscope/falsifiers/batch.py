"""Several tokens: the error of each, and the spread across them, which is another statistic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from driftscope.falsifiers.chain import normalized, relative_error
from driftscope.falsifiers.reader import EvidenceReader
from driftscope.falsifiers.sampling import (
    F64,
    Resampling,
    generator,
    parameter,
    rounded,
    share_with_interval,
    with_interval,
)
from driftscope.falsifiers.super_block import F32, Rows, gaussian_rows, path_a, path_b
from driftscope.kernels.reference import published

_SPREADS = (0.001, 0.01, 0.1, 1.0)
_NULL_ERROR = 0.01

Product = Callable[[Rows, F32, str], F32]


def inputs(parameters: Mapping[str, Any]) -> list[str]:
    """Name the evidence that is read: none, matrices and tokens are drawn."""
    return []


def measure(
    parameters: Mapping[str, Any],
    regimes: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    evidence: EvidenceReader,
) -> dict[str, Any]:
    """Send tokens through chains of 256 x 256 Q4_K matrices on both paths, alone and in a batch.

    Args:
        parameters: `tokens`, `depth` (matrices), `resamples`, `confidence`.
        regimes: name to `spread`, how large the tokens' own parts are beside a part that all have in
            common (0: no common part), and `activation_format`.
        seeds: each draws a chain and tokens.
        evidence: not read.

    Returns:
        In each regime, without unit: `sensitivity`, the deviation of ``std_A / std_B`` from 1 over the mean
        error of the tokens, where std is that of a channel across the tokens, averaged over channels;
        `predicted`, the same if the spread of the errors adds to that of the tokens in quadrature;
        `per_token`, the same with the std of a token across its channels; `error_percent`, the mean error;
        `changed`, the share of outputs whose bits differ between a token alone and in its batch.
    """
    tokens = parameter(parameters, "tokens", int, least=2)
    depth = parameter(parameters, "depth", int, least=1)
    resampling = Resampling.of(parameters)

    def spread_of(a: Sequence[F32], b: Sequence[F32]) -> dict[str, Any]:
        return _spread_metrics(a, b, resampling)

    def alone(spread: float, product: Product) -> dict[str, Any]:
        changed = [_changed(seed, tokens, spread, product) for seed in seeds]
        count = tokens * published.CHAIN_ROWS * len(seeds)
        return {"changed": share_with_interval(sum(changed), count, resampling)}

    def follow(regime: Mapping[str, Any]) -> dict[str, Any]:
        spread = parameter(regime, "spread", float, least=0.0)
        activation = parameter(regime, "activation_format", str)
        a, b = [], []
        for seed in seeds:
            rows = [gaussian_rows(generator(seed, 2, step), published.CHAIN_ROWS) for step in range(depth)]
            start = _tokens(seed, tokens, spread)
            a.append(_end(rows, start, lambda rows, x: path_a(rows, x)))
            b.append(_end(rows, start, lambda rows, x: path_b(rows, x, activation)))
        apart = alone(spread, lambda rows, x, _: path_b(rows, x, activation))
        return {**spread_of(a, b), **apart}

    return {
        "samples": tokens * depth * len(seeds) * len(regimes),
        "published": _published(),
        "regimes": {name: follow(regime) for name, regime in regimes.items()},
        "controls": {
            "tokens-nearly-alike": spread_of(*_synthetic(seeds, tokens, 0.001, common=False)),
            "one-error-for-all": spread_of(*_synthetic(seeds, tokens, 0.001, common=True)),
            "one-scale-for-all": alone(0.0, _one_scale_for_all),
            "path-a": alone(0.0, lambda rows, x, _: path_a(rows, x)),
        },
        # The null model: independent errors of one size on tokens that are more and more alike.
        "domain": [
            *(
                {
                    **spread_of(*_synthetic(seeds, tokens, spread, common=common)),
                    **alone(spread, _one_scale_for_all if common else lambda rows, x, _: path_a(rows, x)),
                }
                for spread in _SPREADS
                for common in (False, True)
            )
        ],
    }


def _tokens(seed: int, count: int, spread: float) -> F32:
    """``f32[count, 256]``: normal values, of which all tokens have a part in common unless `spread` is 0."""
    random = generator(seed, 1)
    common = random.standard_normal(published.VALUES)
    own = random.standard_normal((count, published.VALUES))
    values = own if spread == 0.0 else common + spread * own
    return values.astype(np.float32)


def _end(chain: Sequence[Rows], start: F32, product: Callable[[Rows, F32], F32]) -> F32:
    x = start
    for rows in chain:
        x = normalized(product(rows, x))
    return x


def _synthetic(seeds: Sequence[int], tokens: int, spread: float, *, common: bool) -> tuple[list[F32], ...]:
    """Tokens, and the same with an error of a hundredth: one for all, or one for each."""
    a, b = [], []
    for seed in seeds:
        values = _tokens(seed, tokens, spread).astype(np.float64)
        error = generator(seed, 3).standard_normal((1 if common else tokens, published.VALUES))
        a.append(values.astype(np.float32))
        b.append((values + _NULL_ERROR * error).astype(np.float32))
    return a, b


def _one_scale_for_all(rows: Rows, x: F32, activation: str = "") -> F32:
    """A product that rounds all tokens to one step, that of the largest value of the batch."""
    step = np.abs(x).max() / np.float32(127)
    return path_a(rows, (np.rint(x / step) * step).astype(np.float32))


def _changed(seed: int, tokens: int, spread: float, product: Product) -> int:
    """How many outputs of a product have other bits in the batch than for the token alone."""
    rows = gaussian_rows(generator(seed, 2, 0), published.CHAIN_ROWS)
    x = _tokens(seed, tokens, spread)
    together = product(rows, x, "")
    alone = np.concatenate([product(rows, x[t : t + 1], "") for t in range(tokens)])
    return int((together.view(np.uint32) != alone.view(np.uint32)).sum())


def _spread_metrics(a: Sequence[F32], b: Sequence[F32], resampling: Resampling) -> dict[str, Any]:
    """Summarise ``f32[tokens, channels]`` of each seed; seeds are the clusters of the bootstrap."""
    found = np.array([_of_one_batch(one.astype(np.float64), other) for one, other in zip(a, b, strict=True)])
    return {
        "sensitivity": with_interval(lambda sample: _over_error(sample, 1), found, resampling),
        "predicted": rounded(float(_over_error(found[None], 2)[0])),
        "per_token": with_interval(lambda sample: _over_error(sample, 3), found, resampling),
        "error_percent": rounded(100.0 * float(found[:, 0].mean())),
    }


def _of_one_batch(a: F64, b: F32) -> list[float]:
    """Mean error of the tokens; deviations of std_A / std_B: across tokens, as predicted, within tokens."""
    wide = b.astype(np.float64)
    own, of_error = np.square(a.std(axis=0)).mean(), np.square((wide - a).std(axis=0)).mean()
    within = np.abs(a.std(axis=1) / wide.std(axis=1) - 1.0)
    return [
        float(relative_error(a.astype(np.float32), b).mean()),
        float(abs(a.std(axis=0).mean() / wide.std(axis=0).mean() - 1.0)),
        float(abs(np.sqrt(own / (own + of_error)) - 1.0)),
        float(within.mean()),
    ]


def _over_error(sample: F64, column: int) -> F64:
    """Root mean square over batches of a deviation, over the mean error of their tokens."""
    deviation = np.sqrt(np.square(sample[:, :, column]).mean(axis=1))
    ratio: F64 = deviation / np.maximum(sample[:, :, 0].mean(axis=1), 1e-12)
    return ratio


def _published() -> dict[str, Any]:
    """Return the published batch: errors, stds across tokens, and beside them stds within a token."""
    ends = [
        (
            published.chain(published.path_a_matmul, token),
            published.chain(published.path_b_matmul, token),
        )
        for token in range(published.TOKENS)
    ]
    errors = [100.0 * published.vector_difference(a, b) for a, b in ends]
    a, b = (np.stack(path).astype(np.float64) for path in zip(*ends, strict=True))
    across_a, across_b = (float(path.std(axis=0).mean()) for path in (a, b))
    within = a.std(axis=1) / b.std(axis=1) - 1.0
    deviation = 100.0 * (across_a / across_b - 1.0)
    mean = sum(errors) / len(errors)
    block, ramp = published.block_bytes(), published.activation()
    one_block = 100.0 * published.relative_difference(
        float(published.path_a_dot(block, ramp)), float(published.path_b_dot(block, ramp))
    )
    return {
        "percents": [rounded(error) for error in errors],
        "mean_percent": rounded(mean),
        "largest_over_smallest": rounded(max(errors) / min(errors)),
        "mean_over_first": rounded(mean / errors[0]),
        "across_tokens_a": rounded(across_a),
        "across_tokens_b": rounded(across_b),
        "across_tokens_deviation_percent": rounded(deviation),
        "across_tokens_over_rms": rounded(across_a / float(np.sqrt(np.square(a).mean()))),
        "deviation_over_one_block": rounded(deviation / one_block),
        "deviation_over_mean_error": rounded(deviation / mean),
        "within_token_deviation_percents": [rounded(100.0 * value) for value in within],
        "within_token_mean_percent": rounded(100.0 * float(np.abs(within).mean())),
    }
