"""The innermost steps of a comparison, as vector code that LLVM does not find by itself.

LLVM does not vectorise a float sum, because that changes its order; here the order is written out, so it is
the same on every host, whatever the width of its registers. Fused multiply-adds are asked for by name: they
round once on every host, in software where the processor has none.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir as llvm
from numba.core import types

from driftscope.kernels import ir
from driftscope.kernels.ir import F32, I32, I64, Builder, Value, constant, vector
from driftscope.kernels.jit import device, intrinsic

SMALL, MEDIUM = 1e-3, 1e-2
"""Bounds of the published difference classes: small is below the first, medium below the second."""

# The f32 nearest to each bound. A difference that rounds to another f32 is on the same side of the bound as
# that; of one that rounds to this very value, f32 cannot say.
_NEAR_SMALL, _NEAR_MEDIUM = (int(np.float32(bound).view(np.uint32)) for bound in (SMALL, MEDIUM))

STEP = 32
"""Tiles are padded to a multiple of this many values."""

N_SUMS = 9

_F64 = llvm.DoubleType()
_FOUR, _EIGHT = vector(_F64, 4), vector(I32, 8)


def _fma(builder: Builder, a: Value, b: Value, c: Value) -> Value:
    kind = a.type
    signature = llvm.FunctionType(kind, [kind] * 3)
    return builder.call(builder.module.declare_intrinsic("llvm.fma.v4f64", (), signature), [a, b, c])


def _rolled(builder: Builder, count: Value, initial: list[Value], step: Any) -> list[Value]:
    """As `ir.loop`, but never unrolled: the step fills all registers by itself."""
    values = ir.loop(builder, count, initial, step)
    module = builder.module
    off = module.add_metadata([llvm.MetaDataString(module, "llvm.loop.unroll.disable")])
    itself = llvm.MDValue(module, [off], name=str(len(module.metadata)))
    itself.operands = (itself, off)
    body = values[0].incomings[1][1] if values else None
    assert body is not None
    body.terminator.set_metadata("llvm.loop", itself)
    return values


def _prefetch(builder: Builder, address: Value, k: Value, step: Value) -> None:
    pointer = builder.inttoptr(builder.add(address, builder.mul(k, step)), ir.I8.as_pointer())
    signature = llvm.FunctionType(llvm.VoidType(), [pointer.type, I32, I32, I32])
    function = builder.module.declare_intrinsic("llvm.prefetch.p0", (), signature)
    builder.call(function, [pointer, I32(0), I32(3), I32(1)])


@intrinsic
def add_sums(
    _context: Any, a: Any, b: Any, steps: Any, sums: Any, at_a: Any, by_a: Any, at_b: Any, by_b: Any
) -> Any:
    """Add ``8 * steps`` pairs of f32 at addresses `a` and `b` to ``sums``, f64[N_SUMS, 4].

    Rows: a, b, |a - b|, lane l of pairs l, l + 4, l + 8, ... ; then two each of a^2, b^2 and (a - b)^2, lane
    l of pairs l, l + 8, ... and of pairs l + 4, l + 12, ... . The difference is rounded to f64, every term is
    exact, and every addition rounds once. On the way, `by_a` bytes from address `at_a` on are asked into the
    cache in each step, and likewise of b.
    """
    size = types.intp
    result = types.void(size, size, size, sums, size, size, size, size)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        zero = I64(0)
        left, right = (builder.inttoptr(at, F32.as_pointer()) for at in arguments[:2])
        total = ir.element(context, builder, kinds[3], arguments[3], zero)
        words, single = vector(I64, 4), vector(F32, 4)
        magnitude = constant(I64, (1 << 63) - 1, 4)
        places = [ir.offset(builder, total, 4 * i) for i in range(N_SUMS)]

        def eight(at: Value, before: list[Value]) -> list[Value]:
            totals = list(before)
            for h in range(2):
                place = builder.add(at, I64(4 * h))
                x, y = (
                    builder.fpext(ir.load(builder, ir.offset(builder, p, place), single), _FOUR)
                    for p in (left, right)
                )
                d = builder.fsub(x, y)
                size = builder.bitcast(builder.and_(builder.bitcast(d, words), magnitude), _FOUR)
                for i, (term, plain) in enumerate(((x, x), (y, y), (d, size))):
                    totals[i] = builder.fadd(totals[i], plain)
                    totals[3 + 2 * i + h] = _fma(builder, term, term, totals[3 + 2 * i + h])
            return totals

        def step(k: Value, before: list[Value]) -> list[Value]:
            _prefetch(builder, arguments[4], k, arguments[5])
            _prefetch(builder, arguments[6], k, arguments[7])
            return eight(builder.shl(k, I64(3)), before)

        start = [ir.load(builder, place, _FOUR) for place in places]
        for place, value in zip(places, _rolled(builder, arguments[2], start, step), strict=True):
            ir.store(builder, value, place)
        return context.get_dummy_value()

    return result, generate


def _reduced(initial: list[int], step: Any, join: list[Any]) -> Any:
    """An intrinsic ``(a, b, steps)`` over ``STEP * steps`` pairs of f32 at two addresses.

    Args:
        initial: i32 of every lane at the start, for each result.
        step: takes a builder, eight values of a, eight of b, and lanes of i32; returns lanes.
        join: for each result, how the eight lanes become one number, in i64.
    """

    def define(_context: Any, a: Any, b: Any, steps: Any) -> Any:
        result = types.UniTuple(types.int64, len(initial))(types.intp, types.intp, types.intp)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            left, right = (builder.inttoptr(at, F32.as_pointer()) for at in arguments[:2])

            def run(k: Value, before: list[Value]) -> list[Value]:
                for start in range(0, STEP, 8):
                    at = builder.add(builder.mul(k, I64(STEP)), I64(start))
                    pair = [
                        ir.load(builder, ir.offset(builder, p, at), vector(F32, 8)) for p in (left, right)
                    ]
                    before = step(builder, *pair, before)
                return before

            found = ir.loop(builder, arguments[2], [constant(I32, value, 8) for value in initial], run)
            totals = []
            for lanes, together in zip(found, join, strict=True):
                values = [builder.sext(builder.extract_element(lanes, I32(i)), I64) for i in range(8)]
                totals.append(functools.reduce(functools.partial(together, builder), values))
            return context.make_tuple(builder, signature.return_type, totals)

        return result, generate

    return intrinsic(define)


def _sum(builder: Builder, a: Value, b: Value) -> Value:
    return builder.add(a, b)


def _either(builder: Builder, a: Value, b: Value) -> Value:
    return builder.or_(a, b)


def _larger(builder: Builder, a: Value, b: Value) -> Value:
    return builder.select(builder.icmp_signed(">", a, b), a, b)


def _smaller(builder: Builder, a: Value, b: Value) -> Value:
    return builder.select(builder.icmp_signed("<", a, b), a, b)


def _absolute(builder: Builder, value: Value) -> Value:
    bits = builder.and_(builder.bitcast(value, _EIGHT), constant(I32, 0x7FFFFFFF, 8))
    return builder.bitcast(bits, value.type)


def _add_mask(builder: Builder, total: Value, mask: Value) -> Value:
    return builder.sub(total, builder.sext(mask, _EIGHT))


def _count_above(builder: Builder, d: Value, bound: int, above: Value, near: Value) -> list[Value]:
    """Differences above `bound` (the bits of an f32), and whether one is `bound`."""
    bits = constant(I32, bound, 8)
    same = builder.sext(builder.icmp_signed("==", builder.bitcast(d, _EIGHT), bits), _EIGHT)
    larger = builder.fcmp_ordered(">", d, builder.bitcast(bits, d.type))
    return [_add_mask(builder, above, larger), builder.or_(near, same)]


def _small_step(builder: Builder, x: Value, y: Value, before: list[Value]) -> list[Value]:
    d = _absolute(builder, builder.fsub(x, y))
    bits = builder.bitcast(d, _EIGHT)
    extremes = [_larger(builder, bits, before[0]), _smaller(builder, bits, before[1])]
    return extremes + _count_above(builder, d, _NEAR_SMALL, *before[2:])


def _medium_step(builder: Builder, x: Value, y: Value, before: list[Value]) -> list[Value]:
    return _count_above(builder, _absolute(builder, builder.fsub(x, y)), _NEAR_MEDIUM, *before)


def _equal_step(builder: Builder, x: Value, y: Value, before: list[Value]) -> list[Value]:
    bits = builder.xor(builder.bitcast(x, _EIGHT), builder.bitcast(y, _EIGHT))
    return [_add_mask(builder, before[0], builder.fcmp_ordered("==", x, y)), builder.or_(before[1], bits)]


_reduce_small = _reduced([0, 0x7F800000, 0, 0], _small_step, [_larger, _smaller, _sum, _either])
_reduce_medium = _reduced([0, 0], _medium_step, [_sum, _either])
_reduce_equal = _reduced([0, 0], _equal_step, [_sum, _either])


@intrinsic
def add_powers(_context: Any, values: Any, steps: Any, smallest: Any, total: Any) -> Any:
    """Add to ``total``, f64[4], the squares of the largest powers of two in ``steps * STEP`` values.

    A value below ``2^(smallest - 127)`` counts as that power; infinities and NaNs count as nothing.
    """
    result = types.void(values, types.intp, types.int32, total)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source = ir.element(context, builder, signature.args[0], arguments[0], I64(0))
        place = ir.element(context, builder, signature.args[3], arguments[3], I64(0))
        least = ir.splat(builder, builder.shl(arguments[2], I32(23)), 4)
        exponents = constant(I32, 0x7F800000, 4)

        def step(k: Value, before: list[Value]) -> list[Value]:
            sum_ = before[0]
            for start in range(0, STEP, 4):
                at = builder.add(builder.mul(k, I64(STEP)), I64(start))
                bits = builder.and_(
                    ir.load(builder, ir.offset(builder, source, at), exponents.type), exponents
                )
                special = builder.icmp_signed("==", bits, exponents)
                bits = builder.select(builder.icmp_signed(">", bits, least), bits, least)
                bits = builder.select(special, ir.zeros(bits.type), bits)
                power = builder.fpext(builder.bitcast(bits, vector(F32, 4)), _FOUR)
                sum_ = _fma(builder, power, power, sum_)
            return [sum_]

        after = ir.loop(builder, arguments[1], [ir.load(builder, place, _FOUR)], step)
        ir.store(builder, after[0], place)
        return context.get_dummy_value()

    return result, generate


@device
def classify(a: int, b: int, count: int, padded: int) -> Any:
    """Classes of the first `count` differences of a tile that zeros fill up to `padded`.

    Args:
        a: address of f32[padded].
        b: address of f32[padded].
        count: values.
        padded: a multiple of `STEP`.

    Returns:
        The largest difference, rounded to f32, as its bits (meaningless where a value is not finite); pairs
        that are equal; differences of at least `SMALL` and of at least `MEDIUM`; whether any pair has
        different bits; whether a difference is so near to a bound that f64 has to decide.
    """
    steps = padded // STEP
    largest, smallest, above_small, near = _reduce_small(a, b, steps)
    same, bits, above_medium, close = 0, 1, 0, 0
    if smallest == 0:
        same, bits = _reduce_equal(a, b, steps)
        same -= padded - count
    if largest >= _NEAR_MEDIUM:
        above_medium, close = _reduce_medium(a, b, steps)
    return largest, same, above_small, above_medium, bits != 0, (near | close) != 0
