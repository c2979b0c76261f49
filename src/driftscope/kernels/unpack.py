"""Unpack rows of a block format into small integers and their scales, one kernel a format.

Everything else (dequantize, integer dot products) is the same for all formats once a row is unpacked:

- ``quants  int8[n]``: the integers;
- ``scales  int8[n / sub_block]``: integer scale of each sub-block; 1 where the format has none;
- ``mins    int8[n / sub_block]``: integer minimum of each sub-block; 0 where the format has none;
- ``d       f32[n / block_size]``: the block's scale;
- ``dmin    f32[n / block_size]``: scale of the minima (for Q4_1 and Q5_1 the block's ``m``, with min 1).

The value of an element is ``(d * scale) * quant``, then ``- dmin * min`` or ``+ m`` as the format's
`offset` says, each operation rounded to f32. Layouts: ggml-common.h and ggml-quants.c
(``dequantize_row_*``).

A job compiles and loads the kernels of its model's formats alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba.core import types
from numpy.typing import NDArray

from driftscope.kernels import ir
from driftscope.kernels.block_decoders import DECODERS, block_scales, half_at
from driftscope.kernels.formats import FORMATS, BlockFormat, row_columns
from driftscope.kernels.ir import I8, Builder, Value
from driftscope.kernels.jit import intrinsic, kernel


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
        unpack = _UNPACK[self.layout.name]
        unpack(raw, first, end, self.quants, self.scales, self.mins, self.d, self.dmin)


def check_raw(raw: NDArray[np.uint8], dtype: str) -> tuple[NDArray[np.uint8], int]:
    """`raw` as C-contiguous aligned bytes ``u8[rows, row_bytes]``, and the number of columns."""
    if raw.ndim != 2 or raw.dtype != np.uint8:
        raise ValueError(f"raw bytes must be uint8[rows, row_bytes], not {raw.dtype}{list(raw.shape)}")
    return np.ascontiguousarray(raw), row_columns(dtype, raw.shape[1])


def _unpack_block(name: str) -> Any:
    """An intrinsic that unpacks one block."""
    layout, decoder = FORMATS[name], DECODERS[name]
    subs = layout.block_size // layout.sub_block

    def define(
        _context: Any,
        raw: Any,
        at: Any,
        block: Any,
        quants: Any,
        scales: Any,
        mins: Any,
        d: Any,
        dmin: Any,
    ) -> Any:
        result = types.void(raw, types.intp, types.intp, quants, scales, mins, d, dmin)

        def generate(context: Any, builder: Builder, signature: Any, arguments: Any) -> Any:
            block = arguments[2]

            def target(which: int, each: int) -> Value:
                index = builder.mul(block, block.type(each))
                return ir.element(context, builder, signature.args[which], arguments[which], index)

            source = ir.element(context, builder, signature.args[0], arguments[0], arguments[1])
            to = target(3, layout.block_size)
            for i, part in enumerate(decoder.quants(builder, source)):
                biased = builder.sub(part, ir.constant(I8, decoder.bias, 32)) if decoder.bias else part
                ir.store(builder, biased, ir.offset(builder, to, 32 * i))
            bytes_of = ir.vector(I8, subs)
            one = ir.constant(I8, 1, subs)
            scale = builder.trunc(decoder.scales(builder, source), bytes_of) if decoder.scales else one
            ir.store(builder, scale, target(4, subs))
            if decoder.dmin >= 0:
                least = builder.trunc(decoder.mins(builder, source), bytes_of) if decoder.mins else one
                ir.store(builder, least, target(5, subs))
                ir.store(builder, half_at(builder, [source], decoder.dmin), target(7, 1))
            ir.store(builder, block_scales(builder, decoder, [source]), target(6, 1))
            return context.get_dummy_value()

        return result, generate

    return intrinsic(define)


_block_q4_0 = _unpack_block("Q4_0")
_block_q4_1 = _unpack_block("Q4_1")
_block_q5_0 = _unpack_block("Q5_0")
_block_q5_1 = _unpack_block("Q5_1")
_block_q8_0 = _unpack_block("Q8_0")
_block_q2_k = _unpack_block("Q2_K")
_block_q3_k = _unpack_block("Q3_K")
_block_q4_k = _unpack_block("Q4_K")
_block_q5_k = _unpack_block("Q5_K")
_block_q6_k = _unpack_block("Q6_K")
_block_q8_k = _unpack_block("Q8_K")
_block_iq4_nl = _unpack_block("IQ4_NL")
_block_iq4_xs = _unpack_block("IQ4_XS")
_block_mxfp4 = _unpack_block("MXFP4")

# Each kernel takes raw, its rows first..end, and the arrays of `UnpackedRows`.
_SIGNATURE = "void(R(uint8, 2), int64, int64, int8[:,::1], int8[:,::1], int8[:,::1], f4[:,::1], f4[:,::1])"


@kernel(_SIGNATURE)
def _q4_0(raw: Any, first: int, end: int, quants: Any, scales: Any, mins: Any, d: Any, dmin: Any) -> None:
    blocks = d.shape[1]
    for block in range((end - first) * blocks):
        at = first * raw.shape[1] + block * 18
        _block_q4_0(raw, at, block, quants, scales, mins, d, dmin)


@kernel(_SIGNATURE)
def _q4_1(raw: Any, first: int, end: int, quants: Any, scales: Any, mins: Any, d: Any, dmin: Any) -> None:
    blocks = d.shape[1]
    for block in range((end - first) * blocks):
        at = first * raw.shape[1] + block * 20
        _block_q4_1(raw, at, block, quants, scales, mins, d, dmin)


@kernel(_SIGNATURE)
def _q5_0(raw: Any, first: int, end: int, quants: Any, scales: Any, mins: Any, d: Any, dmin: Any) -> None:
    blocks = d.shape[1]
    for block in range((end - first) * blocks):
        at = first * raw.shape[1] + block * 22
        _block_q5_0(raw, at, block, quants, scales, mins, d, dmin)


@kernel(_SIGNATURE)
def _q5_1(raw: Any, first: int, end: int, quants: Any, scales: Any, mins: Any, d: Any, dmin: Any) -> None:
    blocks = d.shape[1]
    for block in range((end - first) * blocks):
        at = first * raw.shape[1] + block * 24
        _block_q5_1(raw, at, block, quants, scales, mins, d, dmin)


@kernel(_SIGNATURE)
def _q8_0(raw: Any, first: int, end: int, quants: Any, scales: Any, mins: Any, d: Any, dmin: Any) -> None:
    blocks = d.shape[1]
    for block in range((end - first) * blocks):
        at = first * raw.shape[1] + block * 34
        _block_q8_0(raw, at, block, quants, scales, mins, d, dmin)


@kernel(_SIGNATURE)
def _q2_k(raw: Any, first: int, end: int, quants: Any, scales: Any, mins: Any, d: Any, dmin: Any) -> None:
    blocks = d.shape[1]
    for block in range((end - first) * blocks):
        at = first * raw.shape[1] + block * 84
        _block_q2_k(raw, at, block, quants, scales, mins, d, dmin)


@kernel(_SIGNATURE)
def _q3_k(raw: Any, first: int, end: int, quants: Any, scales: Any, mins: Any, d: Any, dmin: Any) -> None:
    blocks = d.shape[1]
    for block in range((end - first) * blocks):
        at = first * raw.shape[1] + block * 110
        _block_q3_k(raw, at, block, quants, scales, mins, d, dmin)


@kernel(_SIGNATURE)
def _q4_k(raw: Any, first: int, end: int, quants: Any, scales: Any, mins: Any, d: Any, dmin: Any) -> None:
    blocks = d.shape[1]
    for block in range((end - first) * blocks):
        at = first * raw.shape[1] + block * 144
        _block_q4_k(raw, at, block, quants, scales, mins, d, dmin)


@kernel(_SIGNATURE)
def _q5_k(raw: Any, first: int, end: int, quants: Any, scales: Any, mins: Any, d: Any, dmin: Any) -> None:
    blocks = d.shape[1]
    for block in range((end - first) * blocks):
        at = first * raw.shape[1] + block * 176
        _block_q5_k(raw, at, block, quants, scales, mins, d, dmin)


@kernel(_SIGNATURE)
def _q6_k(raw: Any, first: int, end: int, quants: Any, scales: Any, mins: Any, d: Any, dmin: Any) -> None:
    blocks = d.shape[1]
    for block in range((end - first) * blocks):
        at = first * raw.shape[1] + block * 210
        _block_q6_k(raw, at, block, quants, scales, mins, d, dmin)


@kernel(_SIGNATURE)
def _q8_k(raw: Any, first: int, end: int, quants: Any, scales: Any, mins: Any, d: Any, dmin: Any) -> None:
    blocks = d.shape[1]
    for block in range((end - first) * blocks):
        at = first * raw.shape[1] + block * 292
        _block_q8_k(raw, at, block, quants, scales, mins, d, dmin)


@kernel(_SIGNATURE)
def _iq4_nl(raw: Any, first: int, end: int, quants: Any, scales: Any, mins: Any, d: Any, dmin: Any) -> None:
    blocks = d.shape[1]
    for block in range((end - first) * blocks):
        at = first * raw.shape[1] + block * 18
        _block_iq4_nl(raw, at, block, quants, scales, mins, d, dmin)


@kernel(_SIGNATURE)
def _iq4_xs(raw: Any, first: int, end: int, quants: Any, scales: Any, mins: Any, d: Any, dmin: Any) -> None:
    blocks = d.shape[1]
    for block in range((end - first) * blocks):
        at = first * raw.shape[1] + block * 136
        _block_iq4_xs(raw, at, block, quants, scales, mins, d, dmin)


@kernel(_SIGNATURE)
def _mxfp4(raw: Any, first: int, end: int, quants: Any, scales: Any, mins: Any, d: Any, dmin: Any) -> None:
    blocks = d.shape[1]
    for block in range((end - first) * blocks):
        at = first * raw.shape[1] + block * 17
        _block_mxfp4(raw, at, block, quants, scales, mins, d, dmin)


_UNPACK = {
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
