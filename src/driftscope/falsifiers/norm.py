"""RMSNorm: what it does to a drift in a direction, and to one in size, from far above eps to below."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from driftscope.falsifiers.reader import EvidenceReader
from driftscope.falsifiers.sampling import F64, Resampling, generator, parameter, rounded, with_interval
from driftscope.falsifiers.super_block import F32
from driftscope.kernels.forward import rms_norm
from driftscope.kernels.reference import published

_DRIFT = 0.00077
_RMS = (1.0, 1e-2, 1e-3, 1e-4, 1e-5)
_LARGE_WEIGHT = 10.0

Norm = Callable[[F32, F32, float], F32]


def inputs(parameters: Mapping[str, Any]) -> list[str]:
    """Name the evidence that is read: none, vectors are drawn."""
    return []


def measure(
    parameters: Mapping[str, Any],
    regimes: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    evidence: EvidenceReader,
) -> dict[str, Any]:
    """Let vectors drift by 0.077 %, in a random direction and in size, and follow both through the norm.

    Args:
        parameters: `channels`, `eps` of the norm, `draws` for each seed, `resamples`, `confidence`.
        regimes: name to `rms` of the normal vectors, `outlier_gain` of one channel (1 for none) and
            `outlier_weight`, the norm's weight of that channel; the other weights are 1.
        seeds: each draws vectors and directions.
        evidence: not read.

    Returns:
        In each regime, without unit, means over draws: `gain`, relative drift behind over that before, of a
        random direction; `predicted`, the same by the derivative in float64; `kept`, relative drift behind
        over that before, of a change of size; `predicted_kept`, ``eps / (mean square + eps)``.
    """
    channels = parameter(parameters, "channels", int, least=2)
    eps = parameter(parameters, "eps", float, least=0.0)
    draws = parameter(parameters, "draws", int, least=8)
    resampling = Resampling.of(parameters)

    def follow(
        rms: float, gain: float = 1.0, weight: float = 1.0, norm: Norm = _kernel, *, own: bool = False
    ) -> dict[str, Any]:
        drawn = [_Draw(seed, draws, channels, rms, gain, weight, own) for seed in seeds]
        return _metrics(drawn, norm, eps, resampling)

    found = {
        name: follow(
            parameter(regime, "rms", float, least=0.0),
            parameter(regime, "outlier_gain", float, least=0.0),
            parameter(regime, "outlier_weight", float, least=0.0),
        )
        for name, regime in regimes.items()
    }
    return {
        "samples": draws * len(seeds) * len(regimes),
        "published": _published(),
        "regimes": found,
        "controls": {
            "drift-under-a-large-weight": follow(1.0, weight=_LARGE_WEIGHT, own=True),
            "no-norm": follow(1.0, norm=_identity),
            "no-eps": follow(1.0, norm=_without_eps),
        },
        # No norm at all, and the norm in float64, are in it whatever state the kernel is in.
        "domain": [
            *(follow(rms) for rms in _RMS),
            *(follow(rms, norm=_exact) for rms in (_RMS[0], _RMS[-1])),
            follow(1.0, norm=_identity),
            follow(1.0, weight=_LARGE_WEIGHT, norm=_exact, own=True),
        ],
    }


class _Draw:
    """Vectors of one seed, drifted in a direction and in size, and the norm's weights."""

    def __init__(
        self, seed: int, count: int, channels: int, rms: float, gain: float, weight: float, own: bool
    ) -> None:
        random = generator(seed)
        x = rms * random.standard_normal((count, channels))
        channel = random.integers(0, channels)
        x[:, channel] *= gain
        direction = random.standard_normal((count, channels))
        if own:
            direction = np.zeros_like(direction)
            direction[:, channel] = 1.0
        direction *= _DRIFT * _norm(x)[:, None] / _norm(direction)[:, None]
        self.x, self.moved, self.scaled = (
            each.astype(np.float32) for each in (x, x + direction, x * (1.0 + _DRIFT))
        )
        self.weight = np.ones(channels, np.float32)
        self.weight[channel] = weight


def _kernel(x: F32, weight: F32, eps: float) -> F32:
    return rms_norm(x, weight, eps)


def _identity(x: F32, weight: F32, eps: float) -> F32:
    return x


def _exact(x: F32, weight: F32, eps: float) -> F32:
    wide = x.astype(np.float64)
    normal: F32 = (wide / _root(wide, eps) * weight).astype(np.float32)
    return normal


def _without_eps(x: F32, weight: F32, eps: float) -> F32:
    return _exact(x, weight, 0.0)


def _root(x: F64, eps: float) -> F64:
    root: F64 = np.sqrt(np.square(x).mean(axis=1, keepdims=True) + eps)
    return root


def _norm(x: Any) -> F64:
    norm: F64 = np.sqrt(np.square(np.asarray(x, np.float64)).sum(axis=1))
    return norm


def _relative(before: F32, after: F32) -> F64:
    relative: F64 = _norm(after.astype(np.float64) - before) / _norm(before)
    return relative


def _predicted(draw: _Draw, eps: float) -> F64:
    """Gain by the derivative: ``w (d - x (x.d) / (n (ms + eps))) / sqrt(ms + eps)`` of a drift d."""
    x = draw.x.astype(np.float64)
    drift = draw.moved - x
    root = _root(x, eps)
    along = (x * drift).sum(axis=1, keepdims=True) / (x.shape[1] * np.square(root))
    behind = draw.weight * (drift - x * along) / root
    gain: F64 = _norm(behind) / _norm(draw.weight * x / root) / (_norm(drift) / _norm(x))
    return gain


def _metrics(draws: Sequence[_Draw], norm: Norm, eps: float, resampling: Resampling) -> dict[str, Any]:
    """Summarise; seeds are the clusters of the bootstrap."""
    gains, kept, predicted, sizes = [], [], [], []
    for draw in draws:
        behind, moved, scaled = (norm(x, draw.weight, eps) for x in (draw.x, draw.moved, draw.scaled))
        gains.append((_relative(behind, moved) / _relative(draw.x, draw.moved)).mean())
        kept.append((_relative(behind, scaled) / _relative(draw.x, draw.scaled)).mean())
        predicted.append(_predicted(draw, eps).mean())
        square = np.square(_root(draw.x.astype(np.float64), 0.0))
        sizes.append((eps / (square + eps)).mean())
    return {
        "gain": with_interval(_mean, np.array(gains), resampling),
        "predicted": rounded(float(np.mean(predicted))),
        "kept": with_interval(_mean, np.array(kept), resampling),
        "predicted_kept": rounded(float(np.mean(sizes))),
    }


def _mean(sample: F64) -> F64:
    mean: F64 = sample.mean(axis=1)
    return mean


def _published() -> dict[str, Any]:
    """Return the published case and how far above eps it lies."""
    before, behind = published.rms_norm_drift()
    mean_square = float(np.square(published.activation().astype(np.float64)).mean())
    return {
        "before_percent": rounded(100.0 * before),
        "behind_percent": rounded(100.0 * behind),
        "amplification": rounded(behind / before),
        "mean_square_over_eps": rounded(mean_square / 1e-6),
    }
