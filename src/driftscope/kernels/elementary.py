"""exp, expm1, tanh, cosine and sine in float64, made of IEEE additions, multiplications and divisions alone.

A C library's functions differ in their last bits from host to host, and no loop that calls them is
vectorized. These are fixed sequences of operations without a branch: a loop over them fills the vectors
that the host has, and every host gets the same bits. They err by 1 to 2.5 units in the last place of
float64, so that what is made of them and rounded to float32 is the correctly rounded value, save for about
one argument in 10^8.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba.core import types

from driftscope.kernels.jit import device, intrinsic

_LOG2_E = 1.0 / math.log(2.0)
# ln 2 in two parts; the first has 32 significant bits, so that its product with an exponent is exact.
_LN2_HIGH = float.fromhex("0x1.62e42feep-1")
_LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")

# Adding it rounds to the nearest integer, which is then in the low bits of the sum.
_INTEGER = 6755399441055744.0  # 1.5 * 2^52

# Beyond these exp is infinite, or far below any float32.
_LARGEST, _SMALLEST = 710.0, -708.0

# Taylor's series of exp to degree 13: at |x| <= ln(2)/2 what is left out is under 2^-57.
(_C2, _C3, _C4, _C5, _C6, _C7, _C8, _C9, _C10, _C11, _C12, _C13) = (
    1.0 / math.factorial(n) for n in range(2, 14)
)


@intrinsic
def _power_of_two(_context: Any, shifted: Any) -> Any:
    """``2^k`` where `shifted` is ``_INTEGER + k`` and ``-1023 < k < 1024``: the low bits as an exponent."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        wide = ir.IntType(64)
        bits = builder.bitcast(arguments[0], wide)
        exponent = builder.shl(builder.add(bits, wide(1023)), wide(52))
        return builder.bitcast(exponent, ir.DoubleType())

    return types.float64(types.float64), generate


@device
def _reduced(x):  # type: ignore[no-untyped-def]
    """``(q, scale)`` with ``exp(x) = (1 + q) * scale * 2`` and `scale` a power of two."""
    shifted = x * _LOG2_E + _INTEGER
    k = shifted - _INTEGER
    r = (x - k * _LN2_HIGH) - k * _LN2_LOW
    square = r * r
    # Pairs, then pairs of pairs: a chain a third as long as Horner's.
    low = (_C2 + _C3 * r) + square * (_C4 + _C5 * r)
    middle = (_C6 + _C7 * r) + square * (_C8 + _C9 * r)
    high = (_C10 + _C11 * r) + square * (_C12 + _C13 * r)
    fourth = square * square
    return r + square * (low + fourth * (middle + fourth * high)), _power_of_two(shifted - 1.0)


@device
def exp(x):  # type: ignore[no-untyped-def]
    """Euler's number to the power of x; infinite from about 709.8, the same for all x below -708."""
    x = _LARGEST if x > _LARGEST else x
    x = _SMALLEST if x < _SMALLEST else x
    q, scale = _reduced(x)
    return (scale + q * scale) * 2.0


@device
def expm1(x):  # type: ignore[no-untyped-def]
    """exp(x) - 1 without cancellation near 0."""
    x = _LARGEST if x > _LARGEST else x
    x = _SMALLEST if x < _SMALLEST else x
    q, scale = _reduced(x)
    return (q * scale + (scale - 0.5)) * 2.0


@device
def tanh(x):  # type: ignore[no-untyped-def]
    """Hyperbolic tangent: ``-m / (m + 2)`` with ``m = expm1(-2|x|)``, with the sign of x."""
    m = expm1(-2.0 * abs(x))
    return math.copysign(m / (m + 2.0), x)


_TWO_OVER_PI = 2.0 / math.pi
# pi / 2 in three parts; the first two have 33 significant bits.
_HALF_PI_1 = float.fromhex("0x1.921fb544p+0")
_HALF_PI_2 = float.fromhex("0x1.0b4611a6p-34")
_HALF_PI_3 = float.fromhex("0x1.3198a2e037073p-69")

# Taylor's series of sine to degree 17 and of cosine to degree 16, of which the first terms stand apart.
(_S3, _S5, _S7, _S9, _S11, _S13, _S15, _S17) = ((-1) ** (n // 2) / math.factorial(n) for n in range(3, 18, 2))
(_K4, _K6, _K8, _K10, _K12, _K14, _K16) = ((-1) ** (n // 2) / math.factorial(n) for n in range(4, 17, 2))


@intrinsic
def _low_bits(_context: Any, shifted: Any) -> Any:
    """The bits of a float64 as int64: those of ``_INTEGER + k`` end in the bits of k."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(64))

    return types.int64(types.float64), generate


@device
def cosine_and_sine(x):  # type: ignore[no-untyped-def]
    """``(cos(x), sin(x))`` of an angle of at most 2^20 in magnitude that has 32 significant bits or fewer."""
    shifted = x * _TWO_OVER_PI + _INTEGER
    k = shifted - _INTEGER
    r = ((x - k * _HALF_PI_1) - k * _HALF_PI_2) - k * _HALF_PI_3
    z = r * r
    series = _S9 + z * (_S11 + z * (_S13 + z * (_S15 + z * _S17)))
    sine = r + r * z * (_S3 + z * (_S5 + z * (_S7 + z * series)))
    series = _K8 + z * (_K10 + z * (_K12 + z * (_K14 + z * _K16)))
    cosine = (1.0 - 0.5 * z) + z * z * (_K4 + z * (_K6 + z * series))
    quarter = _low_bits(shifted) & 3
    a, b = (sine, cosine) if quarter & 1 else (cosine, sine)
    a = -a if quarter == 1 or quarter == 2 else a
    b = -b if quarter >= 2 else b
    return a, b
