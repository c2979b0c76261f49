"""Softmax: does it enlarge a relative drift of its logits, and by more than its derivative says?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from driftscope.falsifiers.reader import EvidenceReader
from driftscope.falsifiers.sampling import F64, Resampling, generator, parameter, rounded, with_interval
from driftscope.falsifiers.super_block import F32
from driftscope.kernels.forward import attention_softmax
from driftscope.kernels.reference import published

_DRIFT = 0.00077
_GAPS = (0.0, 0.5, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0)
_TOP = 10.0
_SHIFTS = (0.0, 10.0, 100.0)
_PUBLISHED = (-1.5, 0.5, -0.8, 10.0, 1.2, -0.3, 0.7)
_PUBLISHED_INDEX = 3
_PUBLISHED_DRIFT = 0.0077

Softmax = Callable[[F32], F32]


def inputs(parameters: Mapping[str, Any]) -> list[str]:
    """Name the evidence that is read: none, logits are drawn."""
    return []


def measure(
    parameters: Mapping[str, Any],
    regimes: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    evidence: EvidenceReader,
) -> dict[str, Any]:
    """Let every logit drift by 0.077 % of itself, up or down, and follow the L1 norm through the softmax.

    Args:
        parameters: `keys` (logits of a softmax), `draws` for each seed, `resamples`, `confidence`.
        regimes: name to `top`, the largest logit, and `gap`, how far the second is below it; the others
            are standard normal, but not above the second.
        seeds: each draws logits and signs of the drift.
        evidence: not read.

    Returns:
        In each regime, without unit: `gain`, relative L1 drift of the probabilities over that of the
        logits, mean over draws; `predicted`, the same by the Jacobian ``p_i (delta_ij - p_j)`` in float64;
        `excess`, total drift of the probabilities over what the Jacobian predicts; `top_probability`, mean.
    """
    keys = parameter(parameters, "keys", int, least=3)
    draws = parameter(parameters, "draws", int, least=16)
    resampling = Resampling.of(parameters)

    def follow(top: float, gap: float, softmax: Softmax = _kernel, common: bool = False) -> dict[str, Any]:
        pairs = [_logits(seed, draws, keys, top, gap, common) for seed in seeds]
        return _metrics(pairs, softmax, resampling)

    return {
        "samples": draws * len(seeds) * len(regimes),
        "published": _published(),
        "regimes": {
            name: follow(parameter(regime, "top", float), parameter(regime, "gap", float, least=0.0))
            for name, regime in regimes.items()
        },
        "controls": {
            "tie-of-large-logits": follow(3 * _TOP, 0.0),
            "one-drift-for-all": follow(_TOP, 0.0, common=True),
            "doubled-scores": follow(_TOP, 0.0, lambda logits: _kernel(2 * logits)),
            "float64": follow(_TOP, 2.0, _exact),
        },
        # A tie, a certainty and a wrong scale by float64 are in it whatever state the kernel is in.
        "domain": [
            *(follow(_TOP, gap) for gap in _GAPS),
            *(follow(_TOP, gap, _exact) for gap in (0.0, 10.0)),
            follow(_TOP, 0.0, lambda logits: _exact(2 * logits)),
        ],
    }


def _logits(seed: int, count: int, keys: int, top: float, gap: float, common: bool) -> tuple[F32, F32]:
    """``f32[count, keys]`` before and after the drift."""
    random = generator(seed)
    logits = np.minimum(random.standard_normal((count, keys)), top - gap)
    logits[:, 0], logits[:, 1] = top, top - gap
    size = np.full(logits.shape, _DRIFT * top) if common else _DRIFT * np.abs(logits)
    signs = 1.0 if common else random.choice([-1.0, 1.0], logits.shape)
    before = logits.astype(np.float32)
    return before, (logits + signs * size).astype(np.float32)


def _kernel(logits: F32) -> F32:
    """The softmax of the forward pass; each row is the last query of a head, which sees all keys."""
    count, keys = logits.shape
    scores = np.zeros((keys, count * keys), np.float32)
    scores[-1] = logits.reshape(-1)
    return attention_softmax(scores, n_heads=count)[-1].reshape(count, keys)


def _exact(logits: F32) -> F32:
    return _probabilities(logits).astype(np.float32)


def _probabilities(logits: F32) -> F64:
    wide = logits.astype(np.float64)
    powers = np.exp(wide - wide.max(axis=1, keepdims=True))
    probabilities: F64 = powers / powers.sum(axis=1, keepdims=True)
    return probabilities


def _predicted(before: F32, after: F32) -> F64:
    """L1 norm of the Jacobian of the softmax times the drift, ``f64[n]``."""
    drift = after.astype(np.float64) - before
    p = _probabilities(before)
    mean = (p * drift).sum(axis=1, keepdims=True)
    predicted: F64 = np.abs(p * (drift - mean)).sum(axis=1)
    return predicted


def _l1(x: Any) -> F64:
    total: F64 = np.abs(np.asarray(x, np.float64)).sum(axis=1)
    return total


def _metrics(pairs: Sequence[tuple[F32, F32]], softmax: Softmax, resampling: Resampling) -> dict[str, Any]:
    """Summarise; seeds are the clusters of the bootstrap."""
    gains, predictions, totals, tops = [], [], [], []
    for before, after in pairs:
        given = _l1(after.astype(np.float64) - before) / _l1(before)
        p = softmax(before)
        drift, predicted = _l1(softmax(after).astype(np.float64) - p), _predicted(before, after)
        gains.append((drift / _l1(p) / given).mean())
        predictions.append((predicted / given).mean())
        totals.append([drift.sum(), predicted.sum()])
        tops.append(p[:, 0].astype(np.float64).mean())
    return {
        "gain": with_interval(_mean, np.array(gains), resampling),
        "predicted": rounded(float(np.mean(predictions))),
        "excess": with_interval(_ratio_of_totals, np.array(totals), resampling),
        "top_probability": rounded(float(np.mean(tops))),
    }


def _mean(sample: F64) -> F64:
    mean: F64 = sample.mean(axis=1)
    return mean


def _ratio_of_totals(sample: F64) -> F64:
    totals = sample.sum(axis=1)
    ratio: F64 = totals[:, 0] / np.maximum(totals[:, 1], np.finfo(np.float64).tiny)
    return ratio


def _published() -> dict[str, Any]:
    """Return the published case, its exact figure, and the same with a constant added to all logits."""
    logits = np.array(_PUBLISHED, np.float32)
    moved = logits.copy()
    moved[_PUBLISHED_INDEX] += np.float32(_PUBLISHED_DRIFT)
    given, behind = published.softmax_drift()
    exact = float(_l1(_probabilities(moved[None]) - _probabilities(logits[None]))[0])
    by_shift = []
    for shift in _SHIFTS:
        size = float(_l1(logits[None].astype(np.float64) + shift)[0])
        by_shift.append({"shift": shift, "amplification": rounded(exact * size / _PUBLISHED_DRIFT)})
    return {
        "before_percent": rounded(100.0 * given),
        "behind_percent": rounded(100.0 * behind),
        "amplification": rounded(behind / given),
        "exact_amplification": rounded(exact / given),
        "predicted_amplification": rounded(float(_predicted(logits[None], moved[None])[0]) / given),
        "top_probability": rounded(float(_probabilities(logits[None])[0, _PUBLISHED_INDEX])),
        "by_shift": by_shift,
    }
