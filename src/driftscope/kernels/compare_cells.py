"""How far each cell of 32 neighbouring values is off, in steps of its own, as one byte a figure.

A cell's mean squared error over the squared step that its format rounds to is near 1/12 where the one side is
the rounding of the other. Two figures are kept: that energy in units of 1/12 of a squared step, and the
largest squared difference in squared steps, at most 1/4 where every value went to its nearest level. Each
becomes the leading bits of its f32, which is its logarithm to the base two, piecewise linear.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba.core import types
from numpy.typing import NDArray

from driftscope.kernels import ir
from driftscope.kernels.block_decoders import DECODERS, IQ4_LEVELS
from driftscope.kernels.expected_error import EXPONENT, NONE, cell_kind
from driftscope.kernels.formats import BlockFormat
from driftscope.kernels.ir import F32, I8, I32, I64, Builder, Value, constant, vector
from driftscope.kernels.jit import intrinsic

CELL = 32
"""Values of a cell."""

GROUP = 8
"""Cells that are coded at once."""

# Bits of the mantissa, and the exponent, biased as in f32, below which the step no longer shrinks.
_FLOATS = {
    "F16": (10, 113),
    "BF16": (7, 1),
    "F8_E4M3": (3, 121),
    "F8_E5M2": (2, 113),
    "F8_E4M3FNUZ": (3, 120),
    "F8_E5M2FNUZ": (2, 112),
    "F8_E8M0": (0, 1),
}
_OF_F32 = (23, 1)

# The square of four times the smallest f16. A block's scale has one rounding error for all of its values,
# whose square may be three times the mean; so may that of a quant.
_UNDERFLOW = 2.0**-44
_LARGEST_SCALE = {"Q2_K": 15, "Q3_K": 32, "Q4_K": 63, "Q5_K": 63, "Q6_K": 128, "IQ4_XS": 32}
_EIGHT, _WORDS = vector(F32, 8), vector(I32, 8)


@dataclass(frozen=True)
class CodeScale:
    """What a code stands for: ratios from ``2^lowest`` on, ``2^bits`` codes a doubling.

    Code 0 is a cell without any error, code 255 everything above and what is not finite.
    """

    lowest: int
    bits: int

    @property
    def shift(self) -> int:
        """Bits of an f32 that are dropped."""
        return 23 - self.bits

    @property
    def first(self) -> int:
        """The leading bits of the f32 ``2^lowest``."""
        return (127 + self.lowest) << self.bits

    def ratio(self, code: float) -> float:
        """The smallest ratio of a code above 0."""
        exponent, mantissa = divmod(code + self.first, 1 << self.bits)
        return float(2.0 ** (exponent - 127) * (1.0 + mantissa / (1 << self.bits)))

    def code(self, ratio: NDArray[np.floating[Any]] | float) -> NDArray[np.uint8]:
        """The code of ratios that are not negative; of NaN 255."""
        with np.errstate(over="ignore", invalid="ignore"):
            values = np.asarray(ratio).astype(np.float32)
        leading = (values.view(np.int32) >> self.shift) - self.first
        codes = np.clip(leading, 1, 255)
        codes = np.where(np.isnan(values), 255, np.where(values == 0, 0, codes))
        return codes.astype(np.uint8)


BLOCKS = CodeScale(-16, 3)
"""Of formats of integer blocks, whose errors are near their steps."""

FLOATS = CodeScale(-8, 2)
"""Of floats, whose errors reach from a last bit to many times the value."""


def code_scale(layout: BlockFormat) -> CodeScale:
    """The scale of codes where `layout` is the format that was rounded to."""
    return FLOATS if by_exponent(layout) else BLOCKS


def by_exponent(layout: BlockFormat) -> bool:
    """Whether a value's step follows from its exponent; so it is taken where a format has no prediction."""
    return cell_kind(layout) in (EXPONENT, NONE)


def float_step(layout: BlockFormat) -> float:
    """The step of a value in ``[1, 2)``; formats without a prediction are taken as the f32 they decode to."""
    return 2.0 ** -_FLOATS.get(layout.name, _OF_F32)[0]


def least_exponent(layout: BlockFormat) -> int:
    """The exponent, biased as in f32, below which the step of a float no longer shrinks."""
    return _FLOATS.get(layout.name, _OF_F32)[1]


def has_steps(layout: BlockFormat) -> bool:
    """Whether a format's steps are known; others are read through the gguf package."""
    return layout.name in _FLOATS or layout.name in ("F32", "F64") or not by_exponent(layout)


@dataclass(frozen=True)
class ScaleRounding:
    """What the rounding of a block's scales adds to a squared step.

    Attributes:
        of_d: in units of d^2.
        of_dmin: in units of dmin^2.
        fixed: by itself.
    """

    of_d: float
    of_dmin: float
    fixed: float


def scale_rounding(layout: BlockFormat) -> ScaleRounding:
    """What the rounding of scales and minima adds to the squared step of a format of integer blocks.

    An integer scale is off by up to 1/2, and a value by that times ``d * quant``: a twelfth of ``d^2`` times
    the mean square of a quant, all of them taken as equally likely. A minimum is off by up to ``dmin / 2``.
    An f16 is off by up to 2^-25 where it is subnormal, and a value by that times quant and scale.
    """
    decoder = DECODERS[layout.name]
    if decoder.d[0] != "f16":
        return ScaleRounding(0.0, 0.0, 0.0)
    quants = np.arange(-127.0, 128.0)
    if decoder.levels:
        quants = IQ4_LEVELS.astype(np.float64)
    elif decoder.largest:
        quants = np.arange(decoder.largest + 1.0) - decoder.bias
    square = float(np.mean(quants * quants))
    if decoder.scales is None:
        return ScaleRounding(0.0, 0.0, _UNDERFLOW * square)
    fixed = _UNDERFLOW * square * _LARGEST_SCALE[layout.name] ** 2 / 3
    return ScaleRounding(square, 0.0 if decoder.mins is None else 1.0, fixed)


Join = Callable[[Builder, Value, Value], Value]


def _across(builder: Builder, rows: list[Value], join: Join) -> Value:
    """Join the lanes of each of eight vectors of eight; results in the order of the vectors."""
    while len(rows) > 2:
        rows = [
            join(
                builder,
                ir.shuffle(builder, a, b, (0, 2, 8, 10, 4, 6, 12, 14)),
                ir.shuffle(builder, a, b, (1, 3, 9, 11, 5, 7, 13, 15)),
            )
            for a, b in zip(rows[::2], rows[1::2], strict=True)
        ]
    low = ir.shuffle(builder, rows[0], rows[1], (0, 1, 2, 3, 8, 9, 10, 11))
    return join(builder, low, ir.shuffle(builder, rows[0], rows[1], (4, 5, 6, 7, 12, 13, 14, 15)))


def _add(builder: Builder, a: Value, b: Value) -> Value:
    return builder.fadd(a, b)


def _larger(builder: Builder, a: Value, b: Value) -> Value:
    return builder.select(builder.icmp_signed(">", a, b), a, b)


def _inverse_power(builder: Builder, value: Value, least: Value) -> Value:
    """One over the power of two in each value, from ``2^(least - 127)`` to the last that has an inverse."""
    bits = builder.and_(builder.bitcast(value, _WORDS), constant(I32, 0x7F800000, 8))
    bits = _larger(builder, bits, least)
    last = constant(I32, 253 << 23, 8)
    bits = builder.select(builder.icmp_signed("<", bits, last), bits, last)
    return builder.bitcast(builder.sub(constant(I32, 254 << 23, 8), bits), _EIGHT)


def _cell(builder: Builder, a: Value, b: Value, first: Value, least: Value | None) -> tuple[Value, Value]:
    """Sums of squares and the largest magnitudes (as bits), by lane, of a cell that begins at `first`."""
    sums, largest = [], []
    for start in range(0, CELL, 8):
        at = builder.add(first, I64(start))
        x, y = (ir.load(builder, ir.offset(builder, side, at), _EIGHT) for side in (a, b))
        d = builder.fsub(x, y)
        if least is not None:
            d = builder.fmul(d, _inverse_power(builder, y, least))
        sums.append(builder.fmul(d, d))
        largest.append(builder.and_(builder.bitcast(d, _WORDS), constant(I32, 0x7FFFFFFF, 8)))
    total = builder.fadd(builder.fadd(sums[0], sums[1]), builder.fadd(sums[2], sums[3]))
    most = _larger(builder, _larger(builder, *largest[:2]), _larger(builder, *largest[2:]))
    return total, most


def _coded(builder: Builder, ratio: Value, error: Value, scale: CodeScale) -> Value:
    """Codes of eight ratios; `error` says where there is none."""
    leading = builder.ashr(builder.bitcast(ratio, _WORDS), constant(I32, scale.shift, 8))
    leading = builder.sub(leading, constant(I32, scale.first, 8))
    highest, lowest = constant(I32, 255, 8), constant(I32, 1, 8)
    leading = _larger(builder, leading, lowest)
    leading = builder.select(builder.icmp_signed("<", leading, highest), leading, highest)
    leading = builder.select(builder.fcmp_unordered("uno", ratio, ratio), highest, leading)
    none = builder.fcmp_ordered("==", error, constant(F32, 0.0, 8))
    return builder.trunc(builder.select(none, ir.zeros(_WORDS), leading), vector(I8, 8))


def _coder(scale: CodeScale, normalised: bool) -> Any:
    """An intrinsic that codes groups of `GROUP` cells.

    Args:
        scale: of the codes.
        normalised: whether errors are taken in powers of two of b.
    """

    def define(
        _context: Any, a: Any, b: Any, squares: Any, groups: Any, least: Any, energies: Any, peaks: Any
    ) -> Any:
        size = types.intp
        result = types.void(size, size, size, size, types.int32, size, size)

        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            at = [builder.inttoptr(arguments[i], F32.as_pointer()) for i in range(3)]
            to = [builder.inttoptr(arguments[i], I8.as_pointer()) for i in (5, 6)]
            bound = ir.splat(builder, builder.shl(arguments[4], I32(23)), 8) if normalised else None

            def step(k: Value, _before: list[Value]) -> list[Value]:
                first = builder.mul(k, I64(GROUP * CELL))
                cells = [
                    _cell(builder, at[0], at[1], builder.add(first, I64(CELL * i)), bound)
                    for i in range(GROUP)
                ]
                total = _across(builder, [cell[0] for cell in cells], _add)
                most = builder.bitcast(_across(builder, [cell[1] for cell in cells], _larger), _EIGHT)
                cell = builder.mul(k, I64(GROUP))
                square = ir.load(builder, ir.offset(builder, at[2], cell), _EIGHT)
                inverse = builder.fdiv(constant(F32, 1.0, 8), square)
                mean = builder.fmul(total, constant(F32, 12.0 / CELL, 8))
                for figure, place in zip((mean, builder.fmul(most, most)), to, strict=True):
                    codes = _coded(builder, builder.fmul(figure, inverse), total, scale)
                    ir.store(builder, codes, ir.offset(builder, place, cell))
                return []

            ir.loop(builder, arguments[3], [], step)
            return context.get_dummy_value()

        return result, generate

    return intrinsic(define)


code_blocks = _coder(BLOCKS, normalised=False)
"""Code groups of cells of a format of integer blocks.

Takes addresses of the values of a and of b (f32, `CELL` a cell), of the squared step of each cell (f32), the
number of groups, the smallest exponent of `code_floats`, and the addresses of the codes of energies and of
peaks, ``uint8[GROUP * groups]``. `code_floats` takes errors in powers of two of each value of b.
"""

code_floats = _coder(FLOATS, normalised=True)


def squared_steps(
    builder: Builder, layout: BlockFormat, scale: Value, d: Value, dmin: Value | None, out: Value
) -> None:
    """Store the squared step of every cell of a block, with what the rounding of its scales adds.

    Args:
        builder: where.
        layout: a format of integer blocks.
        scale: scale of every sub-block; d in every lane where there is one only.
        d: the block's d in eight lanes.
        dmin: what scales the minima, in eight lanes.
        out: pointer to as many f32 as the block has cells.
    """
    extra = scale_rounding(layout)
    square = builder.fmul(scale, scale)
    if scale.type.count == 16:
        even, odd = (ir.pick(builder, square, range(i, 16, 2)) for i in range(2))
        square = builder.fmul(builder.fadd(even, odd), constant(F32, 0.5, 8))
    if DECODERS[layout.name].levels or layout.name == "MXFP4":
        square = ir.zeros(_EIGHT)  # what depends on the levels is added by the caller
    if extra.of_d:
        square = builder.fadd(
            square, builder.fmul(builder.fmul(d, d), constant(F32, float(np.float32(extra.of_d)), 8))
        )
    if extra.of_dmin and dmin is not None:
        square = builder.fadd(square, builder.fmul(dmin, dmin))
    square = builder.fadd(square, constant(F32, float(np.float32(extra.fixed)), 8))
    if layout.block_size == CELL:
        ir.store(builder, builder.extract_element(square, I32(0)), out)
    else:
        ir.store(builder, square, out)
