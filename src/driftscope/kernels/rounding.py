"""Rounding many values at once: blocks of them to small integers, single ones to float16 and bfloat16.

The integer roundings are for blocks of finite values whose products with the factor stay near 127 or below;
`driftscope.kernels.activations` sees to that. Plain instructions with no fast-math flag: the same bits on
every host.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types

from driftscope.kernels.jit import bits_of, bits_to_float, device, intrinsic
from driftscope.kernels.moments import LANES, over

_I8, _I32, _I64, _FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_BYTES, _BITS, _FLOATS = (ir.VectorType(kind, LANES) for kind in (_I8, _I32, _FLOAT))

# Adding 1.5 * 2^23 leaves no room for a fraction: the sum is rounded half to even, and its low bits are
# the integer.
_INTEGER = 12582912.0
_INTEGER_BITS = 0x4B400000


def _at(context: Any, builder: Any, kind: Any, array: Any, index: Any, vector: Any) -> Any:
    """Element `index` of a C-contiguous array as a pointer to vectors."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


def _splat(builder: Any, scalar: Any, vector: Any) -> Any:
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, _I32(0))
    return builder.shuffle_vector(first, first, ir.Constant(_BITS, [0] * LANES))


def _all(vector: Any, value: Any) -> Any:
    return ir.Constant(vector, [value] * LANES)


def _fold(builder: Any, lanes: Any, combine: Any) -> Any:
    """Combine the lanes, half with half."""
    count = LANES
    while count > 1:
        count //= 2
        halves = [
            builder.shuffle_vector(
                lanes, lanes, ir.Constant(ir.VectorType(_I32, count), [start + i for i in range(count)])
            )
            for start in (0, count)
        ]
        lanes = combine(*halves)
    return builder.extract_element(lanes, _I32(0))


@intrinsic
def largest_of_each_sign(_context: Any, x: Any, at: Any, count: Any) -> Any:
    """Bits of the largest positive value of ``x[at : at + count]`` and of the most negative one, as u64.

    The low half is the first as a signed integer (negative where no value is positive), the high half the
    second as an unsigned one (under 2^31 where no value is negative). NaNs count as beyond infinity. `count`
    is a multiple of 16.
    """
    result = types.uint64(x, types.intp, types.intp)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start = _at(context, builder, signature.args[0], arguments[0], arguments[1], _BITS)

        def larger(a: Any, b: Any) -> Any:
            return builder.select(builder.icmp_signed(">", a, b), a, b)

        def larger_unsigned(a: Any, b: Any) -> Any:
            return builder.select(builder.icmp_unsigned(">", a, b), a, b)

        def step(k: Any, before: list[Any]) -> list[Any]:
            bits = builder.load(builder.gep(start, [k]), align=4)
            return [larger(before[0], bits), larger_unsigned(before[1], bits)]

        initial = [_all(_BITS, -(2**31)), _all(_BITS, 0)]
        groups = builder.lshr(arguments[2], arguments[2].type(4))
        positive, negative = over(builder, groups, initial, step)
        low = builder.zext(_fold(builder, positive, larger), _I64)
        high = builder.zext(_fold(builder, negative, larger_unsigned), _I64)
        return builder.or_(builder.shl(high, _I64(32)), low)

    return result, generate


def _quantize(half_to_even: bool) -> Any:
    def define(_context: Any, x: Any, at: Any, count: Any, factor: Any, quants: Any) -> Any:
        result = types.int32(x, types.intp, types.intp, types.float32, quants)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kinds = signature.args
            source = _at(context, builder, kinds[0], arguments[0], arguments[1], _FLOATS)
            target = _at(context, builder, kinds[4], arguments[4], arguments[1], _BYTES)
            factor = _splat(builder, arguments[3], _FLOATS)

            def step(k: Any, before: list[Any]) -> list[Any]:
                values = builder.load(builder.gep(source, [k]), align=4)
                values = builder.fmul(values, factor)
                if half_to_even:
                    shifted = builder.fadd(values, _all(_FLOATS, _INTEGER))
                    whole = builder.sub(builder.bitcast(shifted, _BITS), _all(_BITS, _INTEGER_BITS))
                else:
                    whole = builder.fptosi(values, _BITS)
                    rest = builder.fsub(values, builder.sitofp(whole, _FLOATS))
                    up = builder.fcmp_ordered(">=", rest, _all(_FLOATS, 0.5))
                    down = builder.fcmp_ordered("<=", rest, _all(_FLOATS, -0.5))
                    whole = builder.sub(whole, builder.sext(up, _BITS))
                    whole = builder.add(whole, builder.sext(down, _BITS))
                builder.store(builder.trunc(whole, _BYTES), builder.gep(target, [k]), align=1)
                return [builder.add(before[0], whole)]

            groups = builder.lshr(arguments[2], arguments[2].type(4))
            (lanes,) = over(builder, groups, [_all(_BITS, 0)], step)
            return _fold(builder, lanes, builder.add)

        return result, generate

    return intrinsic(define)


# ``quants[at + i] = round(x[at + i] * factor)`` for `count` values, a multiple of 16; returns their sum.
quantize_half_to_even = _quantize(half_to_even=True)
quantize_half_away = _quantize(half_to_even=False)


@device
def nearest_f16(value):  # type: ignore[no-untyped-def]
    """The float16 nearest to a float32, half to even, as float32; infinite from 65520 on."""
    bits = bits_of(value)
    size = np.uint32(bits & np.uint32(0x7FFFFFFF))
    # 13 bits of the significand go. Below 2^-14 the step is 2^-24, that of float32 just over a half.
    half = np.uint32(np.uint32(size >> np.uint32(13)) & np.uint32(1)) + np.uint32(0xFFF)
    rounded = np.uint32(np.uint32(size + half) & np.uint32(0xFFFFE000))
    rounded = np.uint32(0x7F800000) if rounded > np.uint32(0x477FE000) else rounded
    small = bits_of((bits_to_float(size) + np.float32(0.5)) - np.float32(0.5))
    rounded = small if size < np.uint32(0x38800000) else rounded
    rounded = size if size > np.uint32(0x7F800000) else rounded
    return bits_to_float(np.uint32(np.uint32(bits & np.uint32(0x80000000)) | rounded))


@device
def nearest_bf16(value):  # type: ignore[no-untyped-def]
    """The bfloat16 nearest to a float32, half to even, as float32; a NaN stays one, made quiet."""
    bits = bits_of(value)
    half = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    nan = np.uint32(bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    rounded = np.uint32(bits | np.uint32(0x400000)) if nan else np.uint32(bits + half)
    return bits_to_float(np.uint32(rounded & np.uint32(0xFFFF0000)))
