"""The order of a dot product: how often do two orders give the same bits?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from driftscope.errors import InputError
from driftscope.falsifiers.reader import EvidenceReader
from driftscope.falsifiers.sampling import Resampling, generator, parameter, rounded, share_with_interval
from driftscope.falsifiers.super_block import F32
from driftscope.kernels.matmul import matmul_f32
from driftscope.kernels.reference import published

_UNIT_ROUNDOFF = 2.0**-24
_DOMAIN_BITS = (2, 5, 8, 10, 11, 12, 14)
_DOMAIN_LENGTH = 128
_GROUP = 16

Dot = Callable[[F32, F32], F32]


def inputs(parameters: Mapping[str, Any]) -> list[str]:
    """Name the evidence that is read: none, factors are drawn."""
    return []


def measure(
    parameters: Mapping[str, Any],
    regimes: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    evidence: EvidenceReader,
) -> dict[str, Any]:
    """Compare the scalar dot, in order, with the SIMD dot: eight lanes of fused multiply-adds.

    Args:
        parameters: `dots` drawn for each seed, `resamples` (not used), `confidence`.
        regimes: name to `length` of a dot and `factors`: ``normal``, ``positive`` (their absolute values) or
            ``integers-N``, uniform from -2^N to 2^N.
        seeds: each draws factors.
        evidence: not read.

    Returns:
        In each regime: `equal`, the share of dots with the same bits; `equal_reversed`, the share for the
        scalar dot in order and backwards; `largest_over_bound`, the largest difference over
        ``2 gamma_n sum |a b|``, what two orders can differ by at most (Higham 2002, section 3.1).
    """
    dots = parameter(parameters, "dots", int, least=64)
    resampling = Resampling.of(parameters)

    def compare(length: int, factors: str, first: Dot = _scalar, second: Dot = _simd) -> dict[str, Any]:
        drawn = [_factors(seed, dots, length, factors) for seed in seeds]
        return _metrics(drawn, first, second, resampling)

    same = compare(_DOMAIN_LENGTH, "normal")
    return {
        "samples": dots * len(seeds) * len(regimes),
        "published": {**_published(), "equal_percent": rounded(100.0 * same["equal"]["value"])},
        "regimes": {
            name: compare(parameter(regime, "length", int, least=8), parameter(regime, "factors", str))
            for name, regime in regimes.items()
        },
        "controls": {
            "same-order-twice": compare(_DOMAIN_LENGTH, "normal", published.scalar_dot, published.scalar_dot),
            "nudged": compare(_DOMAIN_LENGTH, "normal", published.scalar_dot, _nudged),
        },
        # From sums that are exact in any order to sums that are not.
        "domain": [
            compare(_DOMAIN_LENGTH, f"integers-{bits}", published.scalar_dot, published.simd_dot)
            for bits in _DOMAIN_BITS
        ],
    }


def _factors(seed: int, count: int, length: int, kind: str) -> tuple[F32, F32]:
    """Two ``f32[count, length]``."""
    random = generator(seed)
    if kind in ("normal", "positive"):
        values = random.standard_normal((2, count, length))
        values = np.abs(values) if kind == "positive" else values
    else:
        name, _, bits = kind.partition("-")
        if name != "integers" or not bits.isdecimal() or not 1 <= int(bits) <= 20:
            raise InputError(
                f"regime parameter `factors` is {kind!r}; expected normal, positive or integers-1 to -20"
            )
        values = random.integers(-(2 ** int(bits)), 2 ** int(bits) + 1, (2, count, length)).astype(np.float64)
    a, b = values.astype(np.float32)
    return a, b


def _scalar(a: F32, b: F32) -> F32:
    """The dot of path A by its kernel: the diagonals of small products."""
    ranges = [slice(start, start + _GROUP) for start in range(0, len(a), _GROUP)]
    return np.concatenate([np.diagonal(matmul_f32(a[part], b[part])) for part in ranges])


def _simd(a: F32, b: F32) -> F32:
    return published.simd_dot(a, b)


def _nudged(a: F32, b: F32) -> F32:
    nudged: F32 = np.nextafter(published.scalar_dot(a, b), np.float32(np.inf))
    return nudged


def _metrics(
    drawn: Sequence[tuple[F32, F32]], first: Dot, second: Dot, resampling: Resampling
) -> dict[str, Any]:
    equal = equal_reversed = count = 0
    largest = 0.0
    for a, b in drawn:
        one, other = first(a, b), second(a, b)
        backwards = published.scalar_dot(a[:, ::-1], b[:, ::-1])
        equal += int((one == other).sum())
        equal_reversed += int((one == backwards).sum())
        count += len(one)
        gamma = a.shape[1] * _UNIT_ROUNDOFF / (1.0 - a.shape[1] * _UNIT_ROUNDOFF)
        bound = 2.0 * gamma * np.abs(a.astype(np.float64) * b.astype(np.float64)).sum(axis=1)
        apart = np.abs(one.astype(np.float64) - other)
        largest = max(largest, float((apart / bound).max()))
    return {
        "equal": share_with_interval(equal, count, resampling),
        "equal_reversed": share_with_interval(equal_reversed, count, resampling),
        "largest_over_bound": rounded(largest),
    }


def _published() -> dict[str, Any]:
    """Return the published input in three orders."""
    a, b = published.dot_factors()
    orders = {
        "scalar": published.scalar_dot(a, b),
        "simd": published.simd_dot(a, b),
        "reversed": published.scalar_dot(a[::-1], b[::-1]),
    }
    found = {name: np.float32(value) for name, value in orders.items()}
    return {
        "value": rounded(float(found["scalar"])),
        **{f"{name}_bits": f"0x{int(value.view(np.uint32)):08x}" for name, value in found.items()},
    }
