"""Whether a tensor is another one's values, each rounded to a smaller float format: bit for bit or not."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from driftscope.analysis.weights.tensor_rows import F32, U8, slabs
from driftscope.artifacts.tensor import TensorRef
from driftscope.kernels.dequantize import dequantize
from driftscope.kernels.formats import format_of

_U32 = np.uint32

_SIGNIFICAND = {
    "F64": 53,
    "F32": 24,
    "F16": 11,
    "BF16": 8,
    "F8_E4M3": 4,
    "F8_E4M3FNUZ": 4,
    "F8_E5M2": 3,
    "F8_E5M2FNUZ": 3,
}
"""Bits of a significand, the leading one included; formats of blocks have none."""


def is_rounded_copy(a: TensorRef, b: TensorRef) -> bool:
    """Whether b stores, bit for bit, the value of its float format that is nearest to a's, ties to even.

    Signs of zeros count; values of a are those that its format decodes to as f32 (F64: as f64).
    False for formats of blocks, for unlike shapes, and where the two containers add unlike constants.
    """
    if a.shape != b.shape or a.value_offset != b.value_offset or not is_float(b.dtype):
        return False
    return all(np.array_equal(_rounded(x, a.dtype, b.dtype), _bits(y, b.dtype)) for x, y in slabs(a, b))


def is_float(dtype: str) -> bool:
    """Whether each value has a significand and an exponent of its own."""
    layout = format_of(dtype)
    return layout.native and not layout.is_integer and layout.block_size == 1


def is_coarser(a: str, b: str) -> bool:
    """Whether values of format a are off by steps of their own that values of format b need not have.

    Subnormal F16 values are: BF16 keeps more of them.
    """
    if a == b:
        return False
    return _SIGNIFICAND.get(a, 0) < _SIGNIFICAND.get(b, 1) or (a, b) == ("F16", "BF16")


def round_values(values: F32, dtype: str) -> F32:
    """Values rounded to a float format, half to even, as f32 again.

    Args:
        values: ``float32[n, k]``.
        dtype: F32, F16, BF16 or one of 8 bits.
    """
    if dtype in ("F32", "F64"):
        return values
    if dtype == "BF16":
        bits = values.view(_U32)
        half = ((bits >> _U32(16)) & _U32(1)) + _U32(0x7FFF)
        rounded = ((bits + half) & _U32(0xFFFF0000)).view(np.float32)
        return np.where(np.isnan(values), values, rounded)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    return _nearest(values, dtype)


def _rounded(raw: U8, source: str, target: str) -> NDArray[np.uint32]:
    """The bits, as f32, of a's values rounded to b's format."""
    if source == "F64" and target != "F64":
        wide = np.ascontiguousarray(raw).view(np.float64)
        if target == "F16":
            with np.errstate(over="ignore"):
                return wide.astype(np.float16).astype(np.float32).view(_U32)
        with np.errstate(over="ignore"):
            narrow = wide.astype(np.float32)
        if target == "F32":
            return narrow.view(_U32)
        return round_values(_to_odd(wide, narrow), target).view(_U32)
    return round_values(dequantize(raw, source), target).view(_U32)


def _to_odd(wide: NDArray[np.float64], narrow: F32) -> F32:
    """f64 to f32, inexact values to the neighbour with an odd last bit: a second rounding is then exact.

    Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008.
    """
    bits = narrow.view(_U32).copy()
    exact = narrow.astype(np.float64) == wide
    away = np.abs(narrow.astype(np.float64)) > np.abs(wide)
    down = ~exact & away & ((bits & _U32(1)) == 0)
    up = ~exact & ~away & ((bits & _U32(1)) == 0)
    bits[down] -= _U32(1)
    bits[up] += _U32(1)
    return bits.view(np.float32)


def _bits(raw: U8, dtype: str) -> NDArray[np.uint32]:
    return dequantize(raw, dtype).view(_U32)


def _nearest(values: F32, dtype: str) -> F32:
    """The nearest value of a format of 8 bits; what is beyond the largest one becomes that or is infinite."""
    codes = np.arange(256, dtype=np.uint8).reshape(-1, 1)
    table = dequantize(codes, dtype).reshape(-1)
    positive = np.flatnonzero(np.isfinite(table) & ~np.signbit(table))
    order = positive[np.argsort(table[positive], kind="stable")]
    levels = table[order].astype(np.float64)
    size = np.abs(values.astype(np.float64))
    above = np.clip(np.searchsorted(levels, size), 1, len(levels) - 1)
    low, high = levels[above - 1], levels[above]
    up = (size - low > high - size) | ((size - low == high - size) & (order[above] % 2 == 0))
    nearest = np.where(up, high, low)
    return np.copysign(nearest, values).astype(np.float32)
