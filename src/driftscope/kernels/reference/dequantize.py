"""Block formats in plain NumPy: how the bytes of a block become integers, scales and values.

Each ``_name(blocks)`` takes ``uint8[n_blocks, block_bytes]`` and returns ``(quants, scales, mins, d, dmin)``:
quants ``[n_blocks, block_size]``, scales and mins ``[n_blocks, sub_blocks]``, d and dmin ``[n_blocks, 1]``.
The layouts are those of ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from driftscope.kernels.formats import format_of, row_columns

Parts = tuple[NDArray, NDArray, NDArray, NDArray, NDArray]
Bytes = NDArray[np.uint8]

_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])


def dequantize(raw: Bytes, dtype: str) -> NDArray[np.float32]:
    """Values ``f32[rows, columns]`` of ``uint8[rows, row_bytes]``, for formats of integer blocks."""
    layout = format_of(dtype)
    columns = row_columns(dtype, raw.shape[1])
    quants, scales, mins, d, dmin = unpack(raw, dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        scale = np.repeat(d * scales.astype(np.float32), layout.sub_block, axis=1)
        shift = np.repeat(dmin * mins.astype(np.float32), layout.sub_block, axis=1)
        values = scale * quants.astype(np.float32)
        if layout.offset == "subtract":
            values = values - shift
        if layout.offset == "add":
            values = values + shift
    return values.reshape(raw.shape[0], columns)


def unpack(raw: Bytes, dtype: str) -> Parts:
    """The parts of every block of `raw`, blocks in storage order."""
    layout = format_of(dtype)
    quants, scales, mins, d, dmin = _UNPACK[dtype](raw.reshape(-1, layout.block_bytes))
    return quants.astype(np.int64), scales.astype(np.int64), mins.astype(np.int64), d, dmin


def _f16(blocks: Bytes, at: int) -> NDArray[np.float32]:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _bits(packed: Bytes, width: int) -> NDArray[np.int64]:
    """``[n, m]`` bytes to ``[n, 8 / width, m]``: first the lowest `width` bits of every byte."""
    shifts = np.arange(0, 8, width)[:, None]
    return (packed[:, None, :].astype(np.int64) >> shifts) & ((1 << width) - 1)


def _flat(array: NDArray[np.int64]) -> NDArray[np.int64]:
    return array.reshape(array.shape[0], -1)


def _simple(quants: NDArray[np.int64], d: NDArray[np.float32]) -> Parts:
    """One scale, no minimum, sub-blocks of 32."""
    ones = np.ones((quants.shape[0], quants.shape[1] // 32))
    return quants, ones, 0 * ones, d, np.zeros_like(d)


def _with_minimum(quants: NDArray[np.int64], d: NDArray[np.float32], m: NDArray[np.float32]) -> Parts:
    ones = np.ones((quants.shape[0], 1))
    return quants, ones, ones, d, m


def _fifth(bits: Bytes) -> NDArray[np.int64]:
    return 16 * np.unpackbits(bits, axis=1, bitorder="little").astype(np.int64)


def _q4_0(blocks: Bytes) -> Parts:
    return _simple(_flat(_bits(blocks[:, 2:], 4)) - 8, _f16(blocks, 0))


def _q4_1(blocks: Bytes) -> Parts:
    return _with_minimum(_flat(_bits(blocks[:, 4:], 4)), _f16(blocks, 0), _f16(blocks, 2))


def _q5_0(blocks: Bytes) -> Parts:
    return _simple(_flat(_bits(blocks[:, 6:], 4)) + _fifth(blocks[:, 2:6]) - 16, _f16(blocks, 0))


def _q5_1(blocks: Bytes) -> Parts:
    quants = _flat(_bits(blocks[:, 8:], 4)) + _fifth(blocks[:, 4:8])
    return _with_minimum(quants, _f16(blocks, 0), _f16(blocks, 2))


def _q8_0(blocks: Bytes) -> Parts:
    return _simple(blocks[:, 2:].astype(np.int8).astype(np.int64), _f16(blocks, 0))


def _q2_k(blocks: Bytes) -> Parts:
    low = _bits(blocks[:, 16:80].reshape(-1, 32), 2).reshape(-1, 256)
    return low, blocks[:, :16] & 15, blocks[:, :16] >> 4, _f16(blocks, 80), _f16(blocks, 82)


def _q3_k(blocks: Bytes) -> Parts:
    low = _bits(blocks[:, 32:96].reshape(-1, 32), 2).reshape(-1, 256)
    third_bit = _flat(_bits(blocks[:, :32], 1))
    scales = _flat(_bits(blocks[:, 96:104], 4)) + 16 * _flat(_bits(blocks[:, 104:108], 2)) - 32
    d = _f16(blocks, 108)
    return low + 4 * third_bit - 4, scales, 0 * scales, d, np.zeros_like(d)


def _six_bits(packed: Bytes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Eight scales and eight minima from 12 bytes (``get_scale_min_k4``)."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=1)
    mins = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=1)
    return scales.astype(np.int64), mins.astype(np.int64)


def _q4_k(blocks: Bytes) -> Parts:
    quants = _bits(blocks[:, 16:].reshape(-1, 32), 4).reshape(-1, 256)
    return quants, *_six_bits(blocks[:, 4:16]), _f16(blocks, 0), _f16(blocks, 2)


def _q5_k(blocks: Bytes) -> Parts:
    low = _bits(blocks[:, 48:].reshape(-1, 32), 4).reshape(-1, 256)
    fifth_bit = _flat(_bits(blocks[:, 16:48], 1))
    return low + 16 * fifth_bit, *_six_bits(blocks[:, 4:16]), _f16(blocks, 0), _f16(blocks, 2)


def _q6_k(blocks: Bytes) -> Parts:
    low = _bits(blocks[:, :128].reshape(-1, 64), 4).reshape(-1, 256)
    high = _bits(blocks[:, 128:192].reshape(-1, 32), 2).reshape(-1, 256)
    scales = blocks[:, 192:208].astype(np.int8)
    d = _f16(blocks, 208)
    return low + 16 * high - 32, scales, 0 * scales, d, np.zeros_like(d)


def _q8_k(blocks: Bytes) -> Parts:
    d = np.ascontiguousarray(blocks[:, :4]).view("<f4")
    return _simple(blocks[:, 4:260].astype(np.int8).astype(np.int64), d)


def _iq4_nl(blocks: Bytes) -> Parts:
    return _simple(_IQ4[_flat(_bits(blocks[:, 2:], 4))], _f16(blocks, 0))


def _iq4_xs(blocks: Bytes) -> Parts:
    quants = _IQ4[_bits(blocks[:, 8:].reshape(-1, 16), 4).reshape(-1, 256)]
    low = _bits(blocks[:, 4:8], 4).swapaxes(1, 2).reshape(-1, 8)
    high = _bits(blocks[:, 2:4], 2).swapaxes(1, 2).reshape(-1, 8)
    d = _f16(blocks, 0)
    scales = low + 16 * high - 32
    return quants, scales, 0 * scales, d, np.zeros_like(d)


def _mxfp4(blocks: Bytes) -> Parts:
    d = np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128).astype(np.float32)
    return _simple(_E2M1[_flat(_bits(blocks[:, 1:], 4))], d)


_UNPACK: dict[str, Callable[[Bytes], Parts]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "Q8_K": _q8_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}
