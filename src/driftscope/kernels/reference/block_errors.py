"""Errors by cell and by row in plain NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from driftscope.kernels.formats import format_of
from driftscope.kernels.reference.compare import _LEVELS
from driftscope.kernels.reference.dequantize import unpack

F32 = NDArray[np.float32]

_CELL = 32
_SMALLEST = {"F16": -14, "F8_E4M3": -6, "F8_E5M2": -14}
_MANTISSA_BITS = {"F16": 10, "BF16": 7, "F8_E4M3": 3, "F8_E5M2": 2}
# Mean square of a quant where all are equally likely, for formats whose sub-blocks have integer scales.
_MEAN_SQUARE = {"Q2_K": 3.5, "Q3_K": 5.5, "Q4_K": 77.5, "Q5_K": 325.5, "Q6_K": 341.5}
_MEAN_SQUARE["IQ4_XS"] = float(np.mean(np.square(_LEVELS["IQ4_XS"])))
_LARGEST_SCALE = {"Q2_K": 15, "Q3_K": 32, "Q4_K": 63, "Q5_K": 63, "Q6_K": 128, "IQ4_XS": 32}
_ONE_SCALE = {"Q4_0": 21.5, "Q4_1": 77.5, "Q5_0": 85.5, "Q5_1": 325.5, "Q8_0": 16256 / 3}
_ONE_SCALE["IQ4_NL"] = _MEAN_SQUARE["IQ4_XS"]


def squared_steps(raw: NDArray[np.uint8], dtype: str) -> F32:
    """Squared step of every cell of a format of integer blocks, ``f32[rows, cells]``."""
    layout = format_of(dtype)
    quants, scales, _, d, dmin = unpack(raw, dtype)
    steps = d * scales.astype(np.float32)
    extra = np.zeros_like(d)
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype in _MEAN_SQUARE:
            extra = (d * d) * np.float32(_MEAN_SQUARE[dtype])
            fixed = 2.0**-44 * _MEAN_SQUARE[dtype] * _LARGEST_SCALE[dtype] ** 2 / 3
        else:
            fixed = 2.0**-44 * _ONE_SCALE.get(dtype, 0.0)
        if dtype in _LEVELS:
            levels = np.array(_LEVELS[dtype], np.float64)
            edges = (levels[1:] + levels[:-1]) / 2
            low = np.concatenate([[2 * levels[0] - edges[0]], edges])
            high = np.concatenate([edges, [2 * levels[-1] - edges[-1]]])
            mean_square = ((high - levels) ** 3 - (low - levels) ** 3) / 3 / (high - low)
            inside = mean_square[np.searchsorted(levels, quants)].reshape(*scales.shape, -1).sum(axis=2)
            extra = extra + np.float32(fixed)
            squares = extra + (steps.astype(np.float64) ** 2 * inside * (12 / _CELL)).astype(np.float32)
        else:
            squares = steps * steps
            if layout.sub_block == 16:
                squares = (squares[:, ::2] + squares[:, 1::2]) * np.float32(0.5)
            squares = squares + extra
            if layout.offset == "subtract":
                squares = squares + dmin * dmin
            squares = squares + np.float32(fixed)
        if layout.block_size // _CELL > squares.shape[1]:  # one scale for several cells
            squares = np.repeat(squares, layout.block_size // _CELL, axis=1)
    return squares.astype(np.float32).reshape(raw.shape[0], -1)


def ratios(a: F32, b: F32, raw: NDArray[np.uint8], dtype: str) -> tuple[F32, F32]:
    """Mean squared error in twelfths of the squared step, and largest in squared steps, by cell.

    In f32, sums in the order of the kernel; rows are filled up to whole cells with zeros.
    """
    missing = -a.shape[1] % _CELL
    a, b = (np.pad(side, ((0, 0), (0, missing))) for side in (a, b))
    with np.errstate(all="ignore"):
        d = a - b
        if format_of(dtype).is_integer:
            squares = squared_steps(raw, dtype)
        else:
            exponents = (b.view(np.uint32) >> 23 & 255).astype(np.int64) - 127
            exponents = np.clip(exponents, _SMALLEST.get(dtype, -126), 126)
            d = d * np.ldexp(np.float32(1), -exponents).astype(np.float32)
            step = 2.0 ** -_MANTISSA_BITS.get(dtype, 23)
            squares = np.full((a.shape[0], a.shape[1] // _CELL), step * step, np.float32)
        parts = (d * d).reshape(a.shape[0], -1, 4, 8)
        lanes = (parts[:, :, 0] + parts[:, :, 1]) + (parts[:, :, 2] + parts[:, :, 3])
        for _ in range(3):
            lanes = lanes[..., ::2] + lanes[..., 1::2]
        total = lanes[..., 0]
        largest = np.abs(d).reshape(a.shape[0], -1, _CELL).max(axis=2)
        inverse = np.float32(1) / squares
        energy, peak = total * np.float32(12 / _CELL) * inverse, largest * largest * inverse
    none = total == 0
    return np.where(none, np.float32(0), energy), np.where(none, np.float32(0), peak)
