"""Stored values to f32 for a comparison, a run of a row at a time, and the squares of their steps.

The values are `driftscope.kernels.dequantize`'s bit for bit, but for the payload of a NaN: the same
operations on the same integers, which come from `driftscope.kernels.block_decoders`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir as llvm
from numba.core import types

from driftscope.kernels import ir
from driftscope.kernels.block_decoders import DECODERS, Decoder
from driftscope.kernels.compare_cells import CELL, squared_steps
from driftscope.kernels.formats import FORMATS, BlockFormat
from driftscope.kernels.ir import F32, I8, I16, I32, I64, Builder, Value, constant, vector
from driftscope.kernels.jit import device, intrinsic

FLOATS = ("F32", "F16", "BF16")
DIRECT = frozenset([*FLOATS, *DECODERS])
"""Formats that `decode` reads."""

UNEVEN = ("IQ4_NL", "IQ4_XS", "MXFP4")
"""Formats whose values lie on uneven levels."""

BLOCK_VALUES = 256
"""Values of the largest block."""

_F64 = llvm.DoubleType()
_BITS = {"F32": 32, "F16": 16, "BF16": 16}
_TYPES = {name: FORMATS[name].ggml_type for name in DIRECT}
_LARGEST = float(np.finfo(np.float64).max)


def _scale_of_block(builder: Builder, decoder: Decoder, block: Value) -> Value:
    """The block's d in eight lanes."""
    kind, at = decoder.d
    place = ir.offset(builder, block, at)
    if kind == "f16":
        return ir.half_to_float(builder, ir.splat(builder, ir.load(builder, place, I16), 8))
    if kind == "f32":
        return ir.splat(builder, ir.load(builder, place, F32), 8)
    exponent = builder.zext(ir.load(builder, place, I8), I32)
    # Half of the power of two (ggml_e8m0_to_fp32_half), of which the two smallest are subnormal.
    small = builder.shl(I32(0x00200000), exponent)
    normal = builder.shl(builder.sub(exponent, I32(1)), I32(23))
    bits = builder.select(builder.icmp_unsigned("<", exponent, I32(2)), small, normal)
    return ir.splat(builder, builder.bitcast(bits, F32), 8)


def _times(builder: Builder, scale: Value, integers: Value | None) -> Value:
    """``scale * integer`` of every sub-block; `scale` itself in every lane where there are no integers."""
    if integers is None:
        return scale
    count = integers.type.count
    wide = scale if count == 8 else ir.concat(builder, scale, scale)
    return builder.fmul(wide, builder.sitofp(integers, vector(F32, count)))


def _decode_block(
    builder: Builder,
    layout: BlockFormat,
    block: Value,
    out: Value,
    quants: Value,
    steps: Value,
    squares: Value,
) -> Value:
    """Store the values of a block; the sum of the squared steps of its values, or 0 if that is not finite."""
    decoder = DECODERS[layout.name]
    scales = None if decoder.scales is None else decoder.scales(builder, block)
    d = _scale_of_block(builder, decoder, block)
    scale = _times(builder, d, scales)
    shift, dmin = None, None
    if decoder.dmin >= 0:
        bits = ir.splat(builder, ir.load(builder, ir.offset(builder, block, decoder.dmin), I16), 8)
        mins = None if decoder.mins is None else decoder.mins(builder, block)
        dmin = ir.half_to_float(builder, bits)
        shift = _times(builder, dmin, mins)
    squared_steps(builder, layout, scale, d, dmin, squares)
    if layout.name in UNEVEN:
        ir.store(builder, scale, steps)
    for i, packed in enumerate(decoder.quants(builder, block)):
        signed = builder.sub(packed, constant(I8, decoder.bias, 32)) if decoder.bias else packed
        if layout.name in UNEVEN:
            ir.store(builder, signed, ir.offset(builder, quants, 32 * i))
        widen = builder.zext if decoder.largest and not decoder.bias else builder.sext
        for first in range(0, 32, 8):
            column = 32 * i + first
            lane = [column // layout.sub_block if scales is not None else 0] * 8
            eight = widen(ir.pick(builder, signed, range(first, first + 8)), vector(I32, 8))
            values = builder.fmul(ir.pick(builder, scale, lane), builder.sitofp(eight, vector(F32, 8)))
            if shift is not None:
                change = builder.fsub if layout.offset == "subtract" else builder.fadd
                values = change(values, ir.pick(builder, shift, lane))
            ir.store(builder, values, ir.offset(builder, out, column))
    return _squares(builder, layout, scale, scales is not None)


def _squares(builder: Builder, layout: BlockFormat, scale: Value, one_a_sub_block: bool) -> Value:
    """The sum of the squared steps of a block's values."""
    if one_a_sub_block:
        total = None
        for first in range(0, scale.type.count, 4):
            four = builder.fpext(ir.pick(builder, scale, range(first, first + 4)), vector(_F64, 4))
            square = builder.fmul(four, four)
            total = square if total is None else builder.fadd(total, square)
        lanes = [builder.extract_element(total, I32(i)) for i in range(4)]
        square = builder.fadd(builder.fadd(lanes[0], lanes[1]), builder.fadd(lanes[2], lanes[3]))
        each = layout.sub_block
    else:
        step = builder.fpext(builder.extract_element(scale, I32(0)), _F64)
        square, each = builder.fmul(step, step), layout.block_size
    finite = builder.fcmp_ordered("<=", square, _F64(_LARGEST))
    return builder.select(finite, builder.fmul(square, _F64(float(each))), _F64(0.0))


def _decode_floats(builder: Builder, name: str, stored: Value, out: Value, width: int) -> None:
    """Store `width` values."""
    packed = ir.load(builder, stored, vector(llvm.IntType(_BITS[name]), width))
    if name == "BF16":
        words = builder.zext(packed, vector(I32, width))
        packed = builder.shl(words, constant(I32, 16, width))
    values = (
        ir.half_to_float(builder, packed) if name == "F16" else builder.bitcast(packed, vector(F32, width))
    )
    ir.store(builder, values, out)


def _define(module: Any, name: str) -> Any:
    """The function ``f64 (stored, out, quants, steps, squares, count)`` that decodes a run of one format."""
    symbol = f"driftscope.decode.{name}"
    if symbol in module.globals:
        return module.globals[symbol]
    pointer = I8.as_pointer()
    floats_at = F32.as_pointer()
    kind = llvm.FunctionType(_F64, [pointer, floats_at, pointer, floats_at, floats_at, I64])
    function = llvm.Function(module, kind, symbol)
    function.linkage = "internal"
    # One copy of each, wherever it is called from: that is most of the time of compiling.
    function.attributes.add("noinline")
    builder = llvm.IRBuilder(function.append_basic_block("entry"))
    stored, out, quants, steps, squares, count = function.args
    layout = FORMATS[name]
    if name in FLOATS:
        size = I64(_BITS[name] // 8)

        def floats(width: int, index: Value) -> list[Value]:
            place = ir.offset(builder, stored, builder.mul(index, size))
            _decode_floats(builder, name, place, ir.offset(builder, out, index), width)
            return []

        eights = builder.lshr(count, I64(3))
        done = builder.shl(eights, I64(3))
        ir.loop(builder, eights, [], lambda k, _: floats(8, builder.shl(k, I64(3))))
        ir.loop(builder, builder.sub(count, done), [], lambda k, _: floats(1, builder.add(done, k)))
        builder.ret(_F64(0.0))
        return function

    def block(k: Value, before: list[Value]) -> list[Value]:
        place = ir.offset(builder, stored, builder.mul(k, I64(layout.block_bytes)))
        values = ir.offset(builder, out, builder.mul(k, I64(layout.block_size)))
        cells = ir.offset(builder, squares, builder.mul(k, I64(layout.block_size // CELL)))
        energy = _decode_block(builder, layout, place, values, quants, steps, cells)
        return [builder.fadd(before[0], energy)]

    builder.ret(ir.loop(builder, count, [_F64(0.0)], block)[0])
    return function


@intrinsic
def address_of(_context: Any, array: Any) -> Any:
    """The address of the first element."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = ir.element(context, builder, signature.args[0], arguments[0], I64(0))
        return builder.ptrtoint(data, I64)

    return types.intp(array), generate


@intrinsic
def _decode_run(
    _context: Any, kind: Any, stored: Any, count: Any, out: Any, quants: Any, steps: Any, squares: Any
) -> Any:
    """Decode `count` blocks at one address to others; the sum of the squared steps of their values."""
    result = types.float64(types.int64, *[types.intp] * 6)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        format_, stored, count, *targets = arguments
        kinds = (F32, I8, F32, F32)
        inside = [
            builder.inttoptr(stored, I8.as_pointer()),
            *(builder.inttoptr(at, kind.as_pointer()) for at, kind in zip(targets, kinds, strict=True)),
            count,
        ]
        end = builder.append_basic_block("end")
        results = [(_F64(0.0), builder.block)]
        choice = builder.switch(format_, end)
        for name in sorted(DIRECT):
            case = builder.append_basic_block(name)
            choice.add_case(I64(_TYPES[name]), case)
            builder.position_at_end(case)
            results.append((builder.call(_define(builder.module, name), inside), case))
            builder.branch(end)
        builder.position_at_end(end)
        total = builder.phi(_F64)
        for value, origin in results:
            total.add_incoming(value, origin)
        return total

    return result, generate


_IQ4_NL, _IQ4_XS, _MXFP4 = (_TYPES[name] for name in UNEVEN)


@device
def decode(
    kind: int,
    block: int,
    size: int,
    stored: int,
    count: int,
    out: int,
    cells: Any,
    quants: Any,
    steps: Any,
    squares: Any,
) -> Any:
    """Decode `count` values.

    Args:
        kind: ggml's number of the format.
        block: values of a block.
        size: bytes of a block.
        stored: address of the first block.
        count: values, a multiple of `block`.
        out: address of as many f32.
        cells: f64[256], see `expected_error.cell_energies`.
        quants: int8[BLOCK_VALUES], scratch.
        steps: f32[8], scratch.
        squares: f32[count / CELL] at least; gets the squared step of every cell of a format of integer
            blocks, with what the rounding of its scales adds.

    Returns:
        The expected error energy of the values of a block format, 0 for floats; parts that are not finite add
        nothing.
    """
    n_blocks = count // block
    to_quants, to_steps, to_squares = address_of(quants), address_of(steps), address_of(squares)
    uneven = kind in (_IQ4_NL, _IQ4_XS, _MXFP4)
    run = 1 if uneven else n_blocks
    total = 0.0
    for b in range(0, n_blocks, run):
        into = to_squares + 4 * b * (block // CELL)
        squared = _decode_run(kind, stored + b * size, run, out + 4 * b * block, to_quants, to_steps, into)
        if not uneven:
            return squared / 12.0
        for s in range(block // 32):
            step = np.float64(steps[s])
            within = 0.0
            for i in range(32 * s, 32 * s + 32):
                within += cells[np.int64(quants[i]) + 128]
            energy = step * step * within
            squares[b * (block // CELL) + s] += np.float32(energy * (12.0 / CELL))
            if np.isfinite(energy):
                total += energy
    return total
