"""Quantize activations: the formats that ggml converts the other factor of a matrix product to.

- ``none``: f32 as it is; ``f16`` and ``bf16``: rounded to nearest even.
- ``q8_0``: blocks of 32, scale ``d = max|x| / 127`` kept as f16, quants ``round(x * (127 / max|x|))``, half
  to even: what llama.cpp runs on x86 (ggml-cpu/arch/x86/quants.c). ``q8_0_ref`` is the portable code
  (``quantize_row_q8_0_ref``): ``round(x * (1 / d))``, half away from zero. They differ in few quants.
- ``q8_1``: as q8_0, and ``s = d * sum(quants)`` kept as f16; ``q8_1_ref`` is the portable code.
- ``q8_K``: blocks of 256, f32 scale from the value that is largest in magnitude, with its sign:
  ``-127 / max``, half to even; the same on every machine.
- ``apr_q8k``: the published investigation's format: blocks of 256, f32 scale ``max|x| / 127`` (1/127 where
  ``max|x| <= 1e-10``), quants ``x * (1 / scale)`` rounded half away from zero.

Non-finite and overflowing values. ggml's formats give what the C code gives on x86: its maximum can lose a
NaN, and a product that is NaN or infinite becomes quant -128 (``q8_0``, ``q8_1``) or 0 (the others). In
``apr_q8k`` a NaN is left out of the maximum and becomes 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.errors import InputError
from driftscope.kernels.jit import bits_of, bits_to_float, device, kernel
from driftscope.kernels.parallel import over_rows
from driftscope.kernels.rounding import (
    largest_of_each_sign,
    nearest_bf16,
    nearest_f16,
    quantize_half_away,
    quantize_half_to_even,
)

_SIMD, _PORTABLE, _SIGNED, _APR = range(4)

# Name: block size and rule.
_INTEGER = {
    "q8_0": (32, _SIMD),
    "q8_1": (32, _SIMD),
    "q8_0_ref": (32, _PORTABLE),
    "q8_1_ref": (32, _PORTABLE),
    "q8_K": (256, _SIGNED),
    "apr_q8k": (256, _APR),
}
_FLOAT = ("none", "f16", "bf16")

_GRAIN = 1 << 16
_SIZE = np.uint32(0x7FFFFFFF)

ACTIVATION_FORMATS = (*_FLOAT, *_INTEGER)


@dataclass(frozen=True)
class RoundedActivation:
    """An activation in a float format.

    Attributes:
        format: ``none``, ``f16`` or ``bf16``.
        values: ``float32[n, k]``, the rounded values.
    """

    format: str
    values: NDArray[np.float32]

    def dequantize(self) -> NDArray[np.float32]:
        """The values, ``float32[n, k]``."""
        return self.values


@dataclass(frozen=True)
class QuantizedActivation:
    """An activation in blocks of small integers.

    Attributes:
        format: its name.
        block_size: values that share a scale.
        quants: ``int8[n, k]``.
        d: ``float32[n, k / block_size]``, the scales as the format keeps them (f16 values for q8_0, q8_1).
        s: ``float32[n, k / block_size]`` for q8_1, f16 values: ``d * sum of the block's quants``; else None.
    """

    format: str
    block_size: int
    quants: NDArray[np.int8]
    d: NDArray[np.float32]
    s: NDArray[np.float32] | None

    def dequantize(self) -> NDArray[np.float32]:
        """``d * quant``, ``float32[n, k]``."""
        with np.errstate(invalid="ignore"):
            return np.repeat(self.d, self.block_size, axis=1) * self.quants.astype(np.float32)


def quantize_activation(
    x: NDArray[np.float32], fmt: str, *, threads: int = 1
) -> RoundedActivation | QuantizedActivation:
    """Convert an activation.

    Args:
        x: ``float32[n, k]``.
        fmt: one of `ACTIVATION_FORMATS`.
        threads: number of threads; the result does not depend on it.

    Raises:
        InputError: unknown format, or k is not a multiple of its block size.
    """
    x = np.ascontiguousarray(x, np.float32)
    n, k = x.shape
    # A thread costs more than to convert some ten thousand values.
    spread = {"threads": threads, "grain": max(1, _GRAIN // max(1, k))}
    if fmt == "none":
        return RoundedActivation(fmt, x)
    if fmt in _FLOAT:
        values, work = np.empty_like(x), _ROUND[fmt]
        over_rows(lambda first, end: work(x[first:end], values[first:end]), n, **spread)
        return RoundedActivation(fmt, values)
    if fmt not in _INTEGER:
        raise InputError(f"activation format {fmt!r} is not known; known are {', '.join(ACTIVATION_FORMATS)}")
    block_size, rule = _INTEGER[fmt]
    if k % block_size:
        raise InputError(f"rows of {k} values cannot be {fmt}: expected a multiple of {block_size} values")
    quants = np.empty((n, k), np.int8)
    d = np.empty((n, k // block_size), np.float32)
    s = np.empty_like(d)

    def part(first: int, end: int) -> None:
        rows = slice(first, end)
        _quantize_rows(x[rows], block_size, rule, quants[rows], d[rows], s[rows])

    over_rows(part, n, **spread)
    return QuantizedActivation(fmt, block_size, quants, d, s if fmt.startswith("q8_1") else None)


@kernel("void(R(f4, 2), f4[:, ::1])")
def _round_f16(x: Any, out: Any) -> None:
    for t in range(x.shape[0]):
        for c in range(x.shape[1]):
            out[t, c] = nearest_f16(x[t, c])


@kernel("void(R(f4, 2), f4[:, ::1])")
def _round_bf16(x: Any, out: Any) -> None:
    for t in range(x.shape[0]):
        for c in range(x.shape[1]):
            out[t, c] = nearest_bf16(x[t, c])


_ROUND = {"f16": _round_f16, "bf16": _round_bf16}


@device
def _nearest_even(value: Any) -> Any:
    """Nearest integer, half to even, of ``|value| < 2^22``: the sum has no room for a fraction."""
    magic = np.float32(12582912.0)
    return (value + magic) - magic


@device
def _away(value: Any) -> Any:
    """C's roundf of a moderate value: half away from zero."""
    whole = np.trunc(value)
    if abs(value - whole) >= np.float32(0.5):
        whole += np.float32(1.0) if value > 0 else np.float32(-1.0)
    return whole


@device
def _larger(a: Any, b: Any) -> Any:
    """x86's maxps: the second operand where either is NaN."""
    return a if a > b else b


@device
def _simd_block(x: Any, quants: Any, lanes: Any) -> Any:
    """``(d, d * sum)`` of a block of 32, and its quants; the maximum in the order of the AVX2 code."""
    for i in range(8):
        lanes[i] = abs(x[i])
    for group in range(1, 4):
        for i in range(8):
            lanes[i] = _larger(lanes[i], abs(x[group * 8 + i]))
    for i in range(4):
        lanes[i] = _larger(lanes[4 + i], lanes[i])
    largest = _larger(_larger(lanes[0], lanes[2]), _larger(lanes[1], lanes[3]))
    d = largest / np.float32(127.0)
    inverse = np.float32(127.0) / largest if largest != 0 else np.float32(0.0)
    total = np.int64(0)
    for i in range(32):
        value = x[i] * inverse
        if abs(value) <= np.float32(4194304.0):
            quant = np.int32(_nearest_even(value))
        else:  # NaN or infinite: cvtps2dq gives the smallest integer
            quant = np.int32(-2147483648)
        total += quant
        quants[i] = min(127, max(-128, quant))
    return d, d * np.float32(np.int32(total))


@device
def _portable_block(x: Any, quants: Any) -> Any:
    largest = np.float32(0.0)
    for i in range(32):
        largest = _larger(largest, abs(x[i]))
    d = largest / np.float32(127.0)
    inverse = np.float32(1.0) / d if d != 0 else np.float32(0.0)
    total = 0
    for i in range(32):
        value = x[i] * inverse
        quant = np.int32(_away(value)) if abs(value) <= np.float32(1e6) else np.int32(0)
        quants[i] = quant
        total += quants[i]
    return d, np.float32(total) * d


@device
def _signed_block(x: Any, quants: Any) -> Any:
    largest = np.float32(0.0)
    signed = np.float32(0.0)
    for i in range(256):
        if abs(x[i]) > largest:
            largest = abs(x[i])
            signed = x[i]
    if largest == 0:
        quants[:] = 0
        return np.float32(0.0)
    inverse = np.float32(-127.0) / signed
    for i in range(256):
        # ggml's nearest_int: the low bits of the sum are the integer.
        shifted = bits_of(inverse * x[i] + np.float32(12582912.0))
        quants[i] = min(127, np.int32(shifted & np.uint32(0x7FFFFF)) - np.int32(0x400000))
    return np.float32(1.0) / inverse


@device
def _apr_block(x: Any, quants: Any) -> Any:
    largest = np.float32(0.0)
    for i in range(256):
        if abs(x[i]) > largest:
            largest = abs(x[i])
    scale = np.float32(1.0) / np.float32(127.0)
    if largest > np.float32(1e-10):
        scale = largest / np.float32(127.0)
    inverse = np.float32(1.0) / scale
    for i in range(256):
        value = x[i] * inverse
        quants[i] = 0 if value != value else np.int32(min(127.0, max(-128.0, _away(value))))
    return scale


@device
def _odd_block(x: Any, quants: Any, rule: Any, lanes: Any) -> Any:
    """``(d, d * sum)`` of a block with values or a scale that are not finite, value by value."""
    if rule == _SIMD:
        return _simd_block(x, quants, lanes)
    if rule == _PORTABLE:
        return _portable_block(x, quants)
    if rule == _SIGNED:
        return _signed_block(x, quants), np.float32(0.0)
    return _apr_block(x, quants), np.float32(0.0)


@device
def _first_sign(x: Any, largest: Any) -> Any:
    """The first value of that magnitude."""
    for i in range(x.shape[0]):
        if abs(x[i]) == largest:
            return x[i]
    return largest


@kernel("void(R(f4, 2), int64, int64, int8[:, ::1], f4[:, ::1], f4[:, ::1])")
def _quantize_rows(x: Any, block_size: int, rule: int, quants: Any, d: Any, s: Any) -> None:
    lanes = np.empty(8, np.float32)
    zero, one, full = np.float32(0.0), np.float32(1.0), np.float32(127.0)
    for t in range(x.shape[0]):
        values, into = x[t], quants[t]
        for b in range(d.shape[1]):
            at = b * block_size
            extremes = largest_of_each_sign(values, at, block_size)
            positive, negative = np.uint32(extremes), np.uint32(extremes >> np.uint64(32))
            # No value of a sign leaves a pattern of the other one.
            positive = np.uint32(0) if positive > _SIZE else positive
            negative = np.uint32(negative & _SIZE) if negative > _SIZE else np.uint32(0)
            largest = bits_to_float(np.uint32(max(positive, negative)))
            scale, total = zero, 0
            if rule == _SIMD:
                factor = full / largest if largest != zero else zero
                scale = largest / full
            elif rule == _PORTABLE:
                scale = largest / full
                factor = one / scale if scale != zero else zero
            elif rule == _SIGNED:
                signed = largest if positive > negative else -largest
                if positive == negative:
                    signed = _first_sign(values[at : at + block_size], largest)
                factor = -full / signed if largest != zero else zero
                scale = one / factor if largest != zero else zero
            else:
                scale = largest / full if largest > np.float32(1e-10) else one / full
                factor = one / scale
            if not (np.isfinite(largest) and np.isfinite(factor)):
                stop = at + block_size
                d[t, b], s[t, b] = _odd_block(values[at:stop], into[at:stop], rule, lanes)
            else:
                if rule in (_PORTABLE, _APR):
                    total = quantize_half_away(values, at, block_size, factor, into)
                else:
                    total = quantize_half_to_even(values, at, block_size, factor, into)
                d[t, b] = scale
                s[t, b] = scale * np.float32(total)
            if block_size == 32:
                d[t, b], s[t, b] = nearest_f16(d[t, b]), nearest_f16(s[t, b])
