"""Sums, extremes and counts of a row in sixteen lanes, written in LLVM's intermediate language.

Lane ``i`` takes the values ``i``, ``i + 16``, ``i + 32``, ... in order, so that the order of every float64
sum is fixed whatever vectors the host has: no fast-math flag, no fused multiply-add. LLVM would not
vectorize such a sum or a minimum by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types

from driftscope.kernels.jit import intrinsic

LANES = 16

_I32, _FLOAT, _DOUBLE = ir.IntType(32), ir.FloatType(), ir.DoubleType()
_BITS, _FLOATS, _DOUBLES = (ir.VectorType(kind, LANES) for kind in (_I32, _FLOAT, _DOUBLE))
_MAGNITUDE, _INFINITY = 0x7FFFFFFF, 0x7F800000


def _all(vector: Any, value: Any) -> Any:
    return ir.Constant(vector, [value] * LANES)


def _pointer(context: Any, builder: Any, kind: Any, array: Any, vector: Any) -> Any:
    """The start of a C-contiguous array as a pointer to vectors."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(data, vector.as_pointer())


def over(
    builder: Any, count: Any, initial: list[Any], step: Callable[[Any, list[Any]], list[Any]]
) -> list[Any]:
    """``for k in range(count): values = step(k, values)`` with the values in registers."""
    before = builder.block
    body, done = builder.append_basic_block("body"), builder.append_basic_block("done")
    builder.cbranch(builder.icmp_signed(">", count, count.type(0)), body, done)
    builder.position_at_end(body)
    k = builder.phi(count.type)
    values = [builder.phi(value.type) for value in initial]
    later = step(k, values)
    next_k = builder.add(k, count.type(1))
    last = builder.block
    builder.cbranch(builder.icmp_signed("<", next_k, count), body, done)
    builder.position_at_end(done)
    results = [builder.phi(value.type) for value in initial]
    k.add_incoming(count.type(0), before)
    k.add_incoming(next_k, last)
    for value, result, first, following in zip(values, results, initial, later, strict=True):
        value.add_incoming(first, before)
        value.add_incoming(following, last)
        result.add_incoming(first, before)
        result.add_incoming(following, last)
    return results


def _magnitude(builder: Any, values: Any) -> Any:
    return builder.and_(builder.bitcast(values, _BITS), _all(_BITS, _MAGNITUDE))


@intrinsic
def take_extremes_and_sums(_context: Any, x: Any, groups: Any, sums: Any, extremes: Any, counts: Any) -> Any:
    """Add the first ``16 * groups`` values of a row to what the lanes hold.

    `sums` is f64[16]: finite values; `extremes` f32[2, 16]: smallest and largest finite value; `counts`
    i32[3, 16]: values that are finite, NaN, zero.
    """
    result = types.void(x, types.intp, sums, extremes, counts)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        row = _pointer(context, builder, kinds[0], arguments[0], _FLOATS)
        places = [_pointer(context, builder, kinds[2], arguments[2], _DOUBLES)]
        for which, vector, parts in ((3, _FLOATS, 2), (4, _BITS, 3)):
            start = _pointer(context, builder, kinds[which], arguments[which], vector)
            places += [builder.gep(start, [_I32(part)]) for part in range(parts)]

        def step(k: Any, before: list[Any]) -> list[Any]:
            total, low, high, *tallies = before
            values = builder.load(builder.gep(row, [k]), align=4)
            size = _magnitude(builder, values)
            finite = builder.icmp_unsigned("<", size, _all(_BITS, _INFINITY))
            nan = builder.icmp_unsigned(">", size, _all(_BITS, _INFINITY))
            zero = builder.icmp_unsigned("==", size, _all(_BITS, 0))
            kept = builder.select(finite, values, _all(_FLOATS, 0.0))
            small = builder.select(finite, values, _all(_FLOATS, float("inf")))
            large = builder.select(finite, values, _all(_FLOATS, float("-inf")))
            return [
                builder.fadd(total, builder.fpext(kept, _DOUBLES)),
                builder.select(builder.fcmp_ordered("<", small, low), small, low),
                builder.select(builder.fcmp_ordered(">", large, high), large, high),
                *(
                    builder.sub(tally, builder.sext(mask, _BITS))
                    for tally, mask in zip(tallies, (finite, nan, zero), strict=True)
                ),
            ]

        start = [builder.load(place, align=4) for place in places]
        for place, value in zip(places, over(builder, arguments[1], start, step), strict=True):
            builder.store(value, place, align=4)
        return context.get_dummy_value()

    return result, generate


@intrinsic
def take_squares(_context: Any, x: Any, groups: Any, mean: Any, sums: Any) -> Any:
    """Add the distances of the first ``16 * groups`` values from `mean` to what the lanes hold.

    `sums` is f64[2, 16]: of the squared distances of finite values, and of the distances.
    """
    result = types.void(x, types.intp, types.float64, sums)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        row = _pointer(context, builder, kinds[0], arguments[0], _FLOATS)
        start = _pointer(context, builder, kinds[3], arguments[3], _DOUBLES)
        places = [builder.gep(start, [_I32(part)]) for part in range(2)]
        mean = ir.Constant(_DOUBLES, ir.Undefined)
        for lane in range(LANES):
            mean = builder.insert_element(mean, arguments[2], _I32(lane))

        def step(k: Any, before: list[Any]) -> list[Any]:
            values = builder.load(builder.gep(row, [k]), align=4)
            finite = builder.icmp_unsigned("<", _magnitude(builder, values), _all(_BITS, _INFINITY))
            away = builder.fsub(builder.fpext(values, _DOUBLES), mean)
            away = builder.select(finite, away, _all(_DOUBLES, 0.0))
            return [builder.fadd(before[0], builder.fmul(away, away)), builder.fadd(before[1], away)]

        initial = [builder.load(place, align=8) for place in places]
        for place, value in zip(places, over(builder, arguments[1], initial, step), strict=True):
            builder.store(value, place, align=8)
        return context.get_dummy_value()

    return result, generate
