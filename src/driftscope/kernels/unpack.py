"""Unpack a row of a block format into small integers and their scales, one function a format.

Everything else (dequantize, integer dot products) is the same for all formats once a row is unpacked:

- ``quants  int8[n]``: the integers;
- ``scales  int8[n / sub_block]``: integer scale of each sub-block; 1 where the format has none;
- ``mins    int8[n / sub_block]``: integer minimum of each sub-block; 0 where the format has none;
- ``d       f32[n / block_size]``: the block's scale;
- ``dmin    f32[n / block_size]``: scale of the minima (for Q4_1 and Q5_1 the block's ``m``, with min 1).

The value of an element is ``(d * scale) * quant``, then ``- dmin * min`` or ``+ m`` as the format's
`offset` says, each operation rounded to f32. Layouts: ggml-common.h and ggml-quants.c
(``dequantize_row_*``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.kernels.formats import FORMATS, BlockFormat, row_columns
from driftscope.kernels.jit import bits_of, bits_to_float, device, kernel
from driftscope.kernels.vectors import add_bits, split_nibbles

_Q4_0 = FORMATS["Q4_0"].ggml_type
_Q4_1 = FORMATS["Q4_1"].ggml_type
_Q5_0 = FORMATS["Q5_0"].ggml_type
_Q5_1 = FORMATS["Q5_1"].ggml_type
_Q8_0 = FORMATS["Q8_0"].ggml_type
_Q2_K = FORMATS["Q2_K"].ggml_type
_Q3_K = FORMATS["Q3_K"].ggml_type
_Q4_K = FORMATS["Q4_K"].ggml_type
_Q5_K = FORMATS["Q5_K"].ggml_type
_Q6_K = FORMATS["Q6_K"].ggml_type
_Q8_K = FORMATS["Q8_K"].ggml_type
_IQ4_NL = FORMATS["IQ4_NL"].ggml_type
_IQ4_XS = FORMATS["IQ4_XS"].ggml_type
_MXFP4 = FORMATS["MXFP4"].ggml_type

# The 16 levels of IQ4_NL and IQ4_XS, and twice the 16 values of an E2M1 float (MXFP4).
IQ4_LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
E2M1_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)


@device
def _half(row: Any, at: int) -> Any:
    """The f16 at byte `at` as f32. The shifted bits are the value times 2^-112, subnormals included."""
    bits = np.uint32(np.uint32(row[at]) | (np.uint32(row[at + 1]) << np.uint32(8)))
    magnitude = np.uint32(np.uint32(bits & np.uint32(0x7FFF)) << np.uint32(13))
    if (bits & np.uint32(0x7C00)) == np.uint32(0x7C00):
        magnitude |= np.uint32(0x7F800000)
    else:
        magnitude = bits_of(bits_to_float(magnitude) * np.float32(2.0**112))
    return bits_to_float(np.uint32(magnitude | (np.uint32(bits & np.uint32(0x8000)) << np.uint32(16))))


@device
def _single(row: Any, at: int) -> Any:
    """The f32 at byte `at`."""
    low = np.uint32(row[at]) | (np.uint32(row[at + 1]) << np.uint32(8))
    high = np.uint32(row[at + 2]) | (np.uint32(row[at + 3]) << np.uint32(8))
    return bits_to_float(np.uint32(low | (high << np.uint32(16))))


@device
def _e8m0_half(exponent: Any) -> Any:
    """Half of the power of two that an E8M0 byte stands for (ggml_e8m0_to_fp32_half)."""
    if exponent < 2:
        return bits_to_float(np.uint32(np.uint32(0x00200000) << np.uint32(exponent)))
    return bits_to_float(np.uint32(np.uint32(exponent - 1) << np.uint32(23)))


@device
def _levels(row: Any, at: int, quants: Any, to: int, levels: Any) -> None:
    """As `split_nibbles`, through a table of levels."""
    for i in range(16):
        quants[to + i] = levels[row[at + i] & 15]
        quants[to + 16 + i] = levels[row[at + i] >> 4]


@device
def _unpack_q4_0(row: Any, quants: Any, scales: Any, mins: Any, d: Any, dmin: Any) -> None:
    for b in range(d.size):
        at = b * 18
        d[b] = _half(row, at)
        scales[b] = 1
        split_nibbles(row, at + 2, quants, b * 32, b * 32 + 16, np.int8(8))


@device
def _unpack_q4_1(row: Any, quants: Any, scales: Any, mins: Any, d: Any, dmin: Any) -> None:
    for b in range(d.size):
        at = b * 20
        d[b] = _half(row, at)
        dmin[b] = _half(row, at + 2)
        scales[b] = 1
        mins[b] = 1
        split_nibbles(row, at + 4, quants, b * 32, b * 32 + 16, np.int8(0))


@device
def _unpack_q5_0(row: Any, quants: Any, scales: Any, mins: Any, d: Any, dmin: Any) -> None:
    for b in range(d.size):
        at = b * 22
        d[b] = _half(row, at)
        scales[b] = 1
        split_nibbles(row, at + 6, quants, b * 32, b * 32 + 16, np.int8(16))
        add_bits(row, at + 2, quants, b * 32, np.int8(16))


@device
def _unpack_q5_1(row: Any, quants: Any, scales: Any, mins: Any, d: Any, dmin: Any) -> None:
    for b in range(d.size):
        at = b * 24
        d[b] = _half(row, at)
        dmin[b] = _half(row, at + 2)
        scales[b] = 1
        mins[b] = 1
        split_nibbles(row, at + 8, quants, b * 32, b * 32 + 16, np.int8(0))
        add_bits(row, at + 4, quants, b * 32, np.int8(16))


@device
def _unpack_q8_0(row: Any, quants: Any, scales: Any, mins: Any, d: Any, dmin: Any) -> None:
    for b in range(d.size):
        at = b * 34
        d[b] = _half(row, at)
        scales[b] = 1
        for i in range(32):
            quants[b * 32 + i] = np.int8(row[at + 2 + i])


@device
def _unpack_q2_k(row: Any, quants: Any, scales: Any, mins: Any, d: Any, dmin: Any) -> None:
    for b in range(d.size):
        at = b * 84
        for s in range(16):
            scales[b * 16 + s] = row[at + s] & 15
            mins[b * 16 + s] = row[at + s] >> 4
        for half in range(2):
            for j in range(4):
                for i in range(32):
                    value = (row[at + 16 + half * 32 + i] >> (2 * j)) & 3
                    quants[b * 256 + half * 128 + j * 32 + i] = value
        d[b] = _half(row, at + 80)
        dmin[b] = _half(row, at + 82)


@device
def _unpack_q3_k(row: Any, quants: Any, scales: Any, mins: Any, d: Any, dmin: Any) -> None:
    for b in range(d.size):
        at = b * 110
        for half in range(2):
            for j in range(4):
                for i in range(32):
                    low = np.int8((row[at + 32 + half * 32 + i] >> (2 * j)) & 3)
                    # The third bit is stored inverted: a cleared bit means minus 4.
                    high = np.int8((row[at + i] >> (half * 4 + j)) & 1)
                    quants[b * 256 + half * 128 + j * 32 + i] = low + np.int8(4) * high - np.int8(4)
        for s in range(16):
            low4 = (row[at + 96 + (s & 7)] >> (4 * (s >> 3))) & 15
            high2 = (row[at + 104 + (s & 3)] >> (2 * (s >> 2))) & 3
            scales[b * 16 + s] = np.int8(low4 | (high2 << 4)) - np.int8(32)
        d[b] = _half(row, at + 108)


@device
def _scales_and_mins(row: Any, at: int, scales: Any, mins: Any, to: int) -> None:
    """The eight 6-bit scales and minima of Q4_K and Q5_K, from 12 bytes (get_scale_min_k4)."""
    for s in range(4):
        scales[to + s] = row[at + s] & 63
        mins[to + s] = row[at + 4 + s] & 63
        scales[to + 4 + s] = (row[at + 8 + s] & 15) | ((row[at + s] >> 6) << 4)
        mins[to + 4 + s] = (row[at + 8 + s] >> 4) | ((row[at + 4 + s] >> 6) << 4)


@device
def _unpack_q4_k(row: Any, quants: Any, scales: Any, mins: Any, d: Any, dmin: Any) -> None:
    for b in range(d.size):
        at = b * 144
        d[b] = _half(row, at)
        dmin[b] = _half(row, at + 2)
        _scales_and_mins(row, at + 4, scales, mins, b * 8)
        for j in range(4):
            low, to = at + 16 + j * 32, b * 256 + j * 64
            split_nibbles(row, low, quants, to, to + 32, np.int8(0))
            split_nibbles(row, low + 16, quants, to + 16, to + 48, np.int8(0))


@device
def _unpack_q5_k(row: Any, quants: Any, scales: Any, mins: Any, d: Any, dmin: Any) -> None:
    for b in range(d.size):
        at = b * 176
        d[b] = _half(row, at)
        dmin[b] = _half(row, at + 2)
        _scales_and_mins(row, at + 4, scales, mins, b * 8)
        for j in range(4):
            low, to = at + 48 + j * 32, b * 256 + j * 64
            for i in range(32):
                high = row[at + 16 + i] >> (2 * j)
                quants[to + i] = (row[low + i] & 15) | ((high & 1) << 4)
                quants[to + 32 + i] = (row[low + i] >> 4) | ((high & 2) << 3)


@device
def _unpack_q6_k(row: Any, quants: Any, scales: Any, mins: Any, d: Any, dmin: Any) -> None:
    for b in range(d.size):
        at = b * 210
        for half in range(2):
            low = at + half * 64
            high = at + 128 + half * 32
            to = b * 256 + half * 128
            for i in range(32):
                top = row[high + i]
                quants[to + i] = np.int8((row[low + i] & 15) | ((top & 3) << 4)) - np.int8(32)
                quants[to + 32 + i] = np.int8((row[low + 32 + i] & 15) | ((top & 12) << 2)) - np.int8(32)
                quants[to + 64 + i] = np.int8((row[low + i] >> 4) | (top & 48)) - np.int8(32)
                quants[to + 96 + i] = np.int8((row[low + 32 + i] >> 4) | ((top & 192) >> 2)) - np.int8(32)
        for s in range(16):
            scales[b * 16 + s] = np.int8(row[at + 192 + s])
        d[b] = _half(row, at + 208)


@device
def _unpack_q8_k(row: Any, quants: Any, scales: Any, mins: Any, d: Any, dmin: Any) -> None:
    for b in range(d.size):
        at = b * 292
        d[b] = _single(row, at)
        for s in range(8):
            scales[b * 8 + s] = 1
        for i in range(256):
            quants[b * 256 + i] = np.int8(row[at + 4 + i])


@device
def _unpack_iq4_nl(row: Any, quants: Any, scales: Any, mins: Any, d: Any, dmin: Any) -> None:
    for b in range(d.size):
        at = b * 18
        d[b] = _half(row, at)
        scales[b] = 1
        _levels(row, at + 2, quants, b * 32, IQ4_LEVELS)


@device
def _unpack_iq4_xs(row: Any, quants: Any, scales: Any, mins: Any, d: Any, dmin: Any) -> None:
    for b in range(d.size):
        at = b * 136
        d[b] = _half(row, at)
        for s in range(8):
            low4 = (row[at + 4 + (s >> 1)] >> (4 * (s & 1))) & 15
            high2 = (row[at + 2 + (s >> 2)] >> (2 * (s & 3))) & 3
            scales[b * 8 + s] = np.int8(low4 | (high2 << 4)) - np.int8(32)
            _levels(row, at + 8 + s * 16, quants, b * 256 + s * 32, IQ4_LEVELS)


@device
def _unpack_mxfp4(row: Any, quants: Any, scales: Any, mins: Any, d: Any, dmin: Any) -> None:
    for b in range(d.size):
        at = b * 17
        d[b] = _e8m0_half(row[at])
        scales[b] = 1
        _levels(row, at + 1, quants, b * 32, E2M1_DOUBLED)


@kernel("void(int64, R(uint8, 2), int64, int64, int8[:,::1], int8[:,::1], int8[:,::1], f4[:,::1], f4[:,::1])")
def unpack_rows(
    ggml_type: int,
    raw: Any,
    first: int,
    end: int,
    quants: Any,
    scales: Any,
    mins: Any,
    d: Any,
    dmin: Any,
) -> None:
    """Unpack rows ``first..end`` of `raw` into rows ``0..`` of the outputs.

    Outputs must be zeroed by the caller where the format does not write them (`mins`, `dmin`).
    """
    for r in range(first, end):
        row = raw[r]
        o = r - first
        if ggml_type == _Q4_0:
            _unpack_q4_0(row, quants[o], scales[o], mins[o], d[o], dmin[o])
        elif ggml_type == _Q4_1:
            _unpack_q4_1(row, quants[o], scales[o], mins[o], d[o], dmin[o])
        elif ggml_type == _Q5_0:
            _unpack_q5_0(row, quants[o], scales[o], mins[o], d[o], dmin[o])
        elif ggml_type == _Q5_1:
            _unpack_q5_1(row, quants[o], scales[o], mins[o], d[o], dmin[o])
        elif ggml_type == _Q8_0:
            _unpack_q8_0(row, quants[o], scales[o], mins[o], d[o], dmin[o])
        elif ggml_type == _Q2_K:
            _unpack_q2_k(row, quants[o], scales[o], mins[o], d[o], dmin[o])
        elif ggml_type == _Q3_K:
            _unpack_q3_k(row, quants[o], scales[o], mins[o], d[o], dmin[o])
        elif ggml_type == _Q4_K:
            _unpack_q4_k(row, quants[o], scales[o], mins[o], d[o], dmin[o])
        elif ggml_type == _Q5_K:
            _unpack_q5_k(row, quants[o], scales[o], mins[o], d[o], dmin[o])
        elif ggml_type == _Q6_K:
            _unpack_q6_k(row, quants[o], scales[o], mins[o], d[o], dmin[o])
        elif ggml_type == _Q8_K:
            _unpack_q8_k(row, quants[o], scales[o], mins[o], d[o], dmin[o])
        elif ggml_type == _IQ4_NL:
            _unpack_iq4_nl(row, quants[o], scales[o], mins[o], d[o], dmin[o])
        elif ggml_type == _IQ4_XS:
            _unpack_iq4_xs(row, quants[o], scales[o], mins[o], d[o], dmin[o])
        elif ggml_type == _MXFP4:
            _unpack_mxfp4(row, quants[o], scales[o], mins[o], d[o], dmin[o])


@dataclass(frozen=True)
class UnpackedRows:
    """Rows of a block format as integers and scales (see the module's description); reused from slab to slab.

    Attributes:
        layout: the format.
        quants: int8[rows, columns].
        scales: int8[rows, columns / sub_block].
        mins: int8[rows, columns / sub_block].
        d: f32[rows, columns / block_size].
        dmin: f32[rows, columns / block_size].
    """

    layout: BlockFormat
    quants: NDArray[np.int8]
    scales: NDArray[np.int8]
    mins: NDArray[np.int8]
    d: NDArray[np.float32]
    dmin: NDArray[np.float32]

    @classmethod
    def empty(cls, layout: BlockFormat, n_rows: int, n_columns: int) -> UnpackedRows:
        """Room for `n_rows` rows, zeroed."""
        subs, blocks = n_columns // layout.sub_block, n_columns // layout.block_size
        return cls(
            layout,
            np.zeros((n_rows, n_columns), np.int8),
            np.zeros((n_rows, subs), np.int8),
            np.zeros((n_rows, subs), np.int8),
            np.zeros((n_rows, blocks), np.float32),
            np.zeros((n_rows, blocks), np.float32),
        )

    def fill(self, raw: NDArray[np.uint8], first: int, end: int) -> None:
        """Unpack rows ``first..end`` of `raw` into rows ``0..end-first``."""
        unpack_rows(
            self.layout.ggml_type, raw, first, end, self.quants, self.scales, self.mins, self.d, self.dmin
        )


def check_raw(raw: NDArray[np.uint8], dtype: str) -> tuple[NDArray[np.uint8], int]:
    """`raw` as C-contiguous aligned bytes ``u8[rows, row_bytes]``, and the number of columns."""
    if raw.ndim != 2 or raw.dtype != np.uint8:
        raise ValueError(f"raw bytes must be uint8[rows, row_bytes], not {raw.dtype}{list(raw.shape)}")
    return np.ascontiguousarray(raw), row_columns(dtype, raw.shape[1])
