"""Vector operations that LLVM does not find by itself, written in its intermediate language.

Each is a fixed sequence of plain vector instructions with no fast-math flag: LLVM lowers them to what
the host has (AVX-512, AVX2, NEON, ...) and the results are the same everywhere.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from driftscope.kernels.jit import intrinsic

_I8, _I32 = ir.IntType(8), ir.IntType(32)


def _element(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """Pointer to ``array[index]`` of a 1-D C-contiguous array."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


def _splat(builder: Any, scalar: Any, count: int) -> Any:
    vector = ir.Constant(ir.VectorType(scalar.type, count), ir.Undefined)
    vector = builder.insert_element(vector, scalar, ir.Constant(_I32, 0))
    zeros = ir.Constant(ir.VectorType(_I32, count), [0] * count)
    return builder.shuffle_vector(vector, vector, zeros)


def _constant(value: int, count: int) -> Any:
    return ir.Constant(ir.VectorType(_I8, count), [value] * count)


@intrinsic
def split_nibbles(
    _context: Any, source: Any, at: Any, target: Any, low: Any, high: Any, subtract: Any
) -> Any:
    """The low nibbles of ``source[at:at+16]`` to ``target[low:]``, the high ones to ``target[high:]``.

    `subtract` is taken from each. All bytes are read before any is written.
    """
    result = types.void(source, types.intp, target, types.intp, types.intp, types.int8)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, at, target, low, high, subtract = arguments
        vector = ir.VectorType(_I8, 16)
        pointer = _element(context, builder, signature.args[0], source, at)
        packed = builder.load(builder.bitcast(pointer, vector.as_pointer()), align=1)
        shift = _splat(builder, subtract, 16)
        parts = (builder.and_(packed, _constant(15, 16)), builder.lshr(packed, _constant(4, 16)))
        for part, to in zip(parts, (low, high), strict=True):
            pointer = _element(context, builder, signature.args[2], target, to)
            builder.store(builder.sub(part, shift), builder.bitcast(pointer, vector.as_pointer()), align=1)
        return context.get_dummy_value()

    return result, generate


@intrinsic
def add_bits(_context: Any, source: Any, at: Any, target: Any, to: Any, weight: Any) -> Any:
    """Add `weight` to ``target[to + i]`` where bit i of the 32 bits at ``source[at]`` is set."""
    result = types.void(source, types.intp, target, types.intp, types.int8)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, at, target, to, weight = arguments
        vector = ir.VectorType(_I8, 32)
        pointer = _element(context, builder, signature.args[0], source, at)
        bits = builder.load(builder.bitcast(pointer, _I32.as_pointer()), align=1)
        mask = builder.bitcast(bits, ir.VectorType(ir.IntType(1), 32))
        added = builder.select(mask, _splat(builder, weight, 32), _constant(0, 32))
        pointer = builder.bitcast(
            _element(context, builder, signature.args[2], target, to), vector.as_pointer()
        )
        builder.store(builder.add(builder.load(pointer, align=1), added), pointer, align=1)
        return context.get_dummy_value()

    return result, generate


# A tile of a matrix product: ROWS rows of one factor against LANES columns of the other, which is packed
# so that the LANES values of one k are adjacent. 4 x 16 accumulators fill the registers of AVX2.
ROWS = 4
LANES = 16


@intrinsic
def accumulate_f32(
    _context: Any,
    panel: Any,
    at: Any,
    rows: Any,
    row0: Any,
    row1: Any,
    row2: Any,
    row3: Any,
    sums: Any,
    to: Any,
    count: Any,
) -> Any:
    """``sums[r, lane] += rows[row_r + k] * panel[at + k, lane]`` for k = 0 .. count - 1, in this order.

    Each product and each sum is rounded to f32 (no fused multiply-add). `panel` is f32[..., LANES],
    `row0` to `row3` are offsets into `rows`, `sums` is f32[ROWS, LANES].
    """
    offsets = [types.intp] * ROWS
    result = types.void(panel, types.intp, rows, *offsets, sums, types.intp, types.intp)
    vector = ir.VectorType(ir.FloatType(), LANES)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        lanes = builder.bitcast(_element(context, builder, kinds[0], *arguments[:2]), vector.as_pointer())
        values = [_element(context, builder, kinds[2], arguments[2], row) for row in arguments[3:7]]
        totals = builder.bitcast(_element(context, builder, kinds[7], *arguments[7:9]), vector.as_pointer())
        places = [builder.gep(totals, [ir.Constant(_I32, r)]) for r in range(ROWS)]

        def step(k: Any, before: list[Any]) -> list[Any]:
            column = builder.load(builder.gep(lanes, [k]), align=4)
            factors = [_splat(builder, builder.load(builder.gep(value, [k])), LANES) for value in values]
            return [
                builder.fadd(total, builder.fmul(factor, column))
                for total, factor in zip(before, factors, strict=True)
            ]

        after = _loop(builder, arguments[9], [builder.load(place, align=4) for place in places], step)
        for place, total in zip(places, after, strict=True):
            builder.store(total, place, align=4)
        return context.get_dummy_value()

    return result, generate


def _loop(builder: Any, count: Any, initial: list[Any], step: Any) -> list[Any]:
    """``for k in range(count): values = step(k, values)``, values in registers, four steps at a time."""
    two = count.type(2)
    whole = builder.ashr(count, two)

    def four(quarter: Any, values: list[Any]) -> list[Any]:
        k = builder.shl(quarter, two)
        for i in range(4):
            values = step(builder.add(k, count.type(i)), values)
        return values

    done = builder.shl(whole, two)
    values = _plain_loop(builder, whole, initial, four)
    return _plain_loop(builder, builder.sub(count, done), values, lambda k, v: step(builder.add(done, k), v))


def _plain_loop(builder: Any, count: Any, initial: list[Any], step: Any) -> list[Any]:
    before = builder.block
    body, done = builder.append_basic_block("body"), builder.append_basic_block("done")
    zero = count.type(0)
    builder.cbranch(builder.icmp_signed(">", count, zero), body, done)
    with builder.goto_block(body):
        k = builder.phi(count.type)
        values = [builder.phi(value.type) for value in initial]
        following = step(k, values)
        following_k = builder.add(k, count.type(1))
        last = builder.block
        for phi, first, later in zip([k, *values], [zero, *initial], [following_k, *following], strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(later, last)
        builder.cbranch(builder.icmp_signed("<", following_k, count), body, done)
    builder.position_at_end(done)
    results = [builder.phi(value.type) for value in initial]
    for phi, first, later in zip(results, initial, following, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, last)
    return results
