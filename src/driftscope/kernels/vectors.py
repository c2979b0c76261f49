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


def _scale_16(offset: str) -> Any:
    def define(_context: Any, quants: Any, at: Any, scale: Any, shift: Any, out: Any, to: Any) -> Any:
        result = types.void(quants, types.intp, types.float32, types.float32, out, types.intp)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            quants, at, scale, shift, out, to = arguments
            source = _element(context, builder, signature.args[0], quants, at)
            target = _element(context, builder, signature.args[4], out, to)
            floats = ir.VectorType(ir.FloatType(), 16)
            packed = builder.load(builder.bitcast(source, ir.VectorType(_I8, 16).as_pointer()), align=1)
            values = builder.fmul(_splat(builder, scale, 16), builder.sitofp(packed, floats))
            if offset == "subtract":
                values = builder.fsub(values, _splat(builder, shift, 16))
            if offset == "add":
                # Where both are NaN, ggml keeps the first; LLVM may swap the operands of a sum.
                ordered = builder.fcmp_ordered("ord", values, values)
                values = builder.select(ordered, builder.fadd(values, _splat(builder, shift, 16)), values)
            builder.store(values, builder.bitcast(target, floats.as_pointer()), align=4)
            return context.get_dummy_value()

        return result, generate

    return intrinsic(define)


# ``out[to + i] = scale * quants[at + i]``, then minus or plus `shift`, for 16 int8 quants.
scale_16 = _scale_16("none")
scale_16_subtract = _scale_16("subtract")
scale_16_add = _scale_16("add")


@intrinsic
def fold_16(_context: Any, quants: Any, at: Any, scale: Any, out: Any, to: Any) -> Any:
    """``out[to + i] = scale * quants[at + i]`` for 16 int8 quants, in int16."""
    result = types.void(quants, types.intp, types.int16, out, types.intp)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        quants, at, scale, out, to = arguments
        source = _element(context, builder, signature.args[0], quants, at)
        target = _element(context, builder, signature.args[3], out, to)
        wide = ir.VectorType(ir.IntType(16), 16)
        packed = builder.load(builder.bitcast(source, ir.VectorType(_I8, 16).as_pointer()), align=1)
        values = builder.mul(builder.sext(packed, wide), _splat(builder, scale, 16))
        builder.store(values, builder.bitcast(target, wide.as_pointer()), align=2)
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


HALF = LANES // 2


def _multiply_pairs(builder: Any, a: Any, b: Any) -> Any:
    """``<16 x i16>`` times ``<16 x i16>``, neighbours added: ``<8 x i32>``, exact (x86: vpmaddwd)."""
    wide = ir.VectorType(_I32, LANES)
    products = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
    pick = ir.VectorType(_I32, HALF)
    even = builder.shuffle_vector(products, products, ir.Constant(pick, list(range(0, LANES, 2))))
    odd = builder.shuffle_vector(products, products, ir.Constant(pick, list(range(1, LANES, 2))))
    return builder.add(even, odd)


def _integer_dots(builder: Any, panel: Any, rows: list[Any], pairs: Any) -> list[Any]:
    """Integer dot products of ROWS rows with LANES columns: ROWS x 2 vectors of 8 i32.

    `panel` points to i16[pairs, LANES, 2], each of `rows` to i16[2 * pairs].
    """
    vector = ir.VectorType(ir.IntType(16), LANES)
    lanes = builder.bitcast(panel, vector.as_pointer())
    words = [builder.bitcast(row, _I32.as_pointer()) for row in rows]

    def step(pair: Any, before: list[Any]) -> list[Any]:
        at = builder.shl(pair, pairs.type(1))
        halves = [builder.load(builder.gep(lanes, [builder.add(at, at.type(h))]), align=2) for h in range(2)]
        after = []
        for r, word in enumerate(words):
            both = _splat(builder, builder.load(builder.gep(word, [pair]), align=2), HALF)
            factor = builder.bitcast(both, vector)
            for h in range(2):
                product = _multiply_pairs(builder, factor, halves[h])
                after.append(builder.add(before[2 * r + h], product))
        return after

    zeros = [ir.Constant(ir.VectorType(_I32, HALF), [0] * HALF)] * (2 * ROWS)
    return _plain_loop(builder, pairs, zeros, step)


def _accumulate_blocks(with_minimum: bool) -> Any:
    def define(
        _context: Any,
        panel: Any,
        panel_extra: Any,
        panel_scale: Any,
        panel_offset: Any,
        tile: Any,
        rows: Any,
        rows_extra: Any,
        rows_scale: Any,
        rows_offset: Any,
        row0: Any,
        row1: Any,
        row2: Any,
        row3: Any,
        sums: Any,
        to: Any,
        block: Any,
        n_blocks: Any,
        pairs: Any,
        extra_pairs: Any,
        total_blocks: Any,
    ) -> Any:
        size = types.intp
        result = types.void(
            *(panel, panel_extra, panel_scale, panel_offset, size),
            *(rows, rows_extra, rows_scale, rows_offset, size, size, size, size),
            *(sums, size, size, size, size, size, size),
        )

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kinds = signature.args
            tile, (row_numbers, to, first) = arguments[4], (arguments[9:13], arguments[14], arguments[15])
            n_blocks, pairs, extra_pairs, total = arguments[16:20]
            floats = ir.VectorType(ir.FloatType(), HALF)

            def element(which: int, index: Any) -> Any:
                return _element(context, builder, kinds[which], arguments[which], index)

            def times(*factors: Any) -> Any:
                product = factors[0]
                for factor in factors[1:]:
                    product = builder.mul(
                        product, factor if hasattr(factor, "type") else product.type(factor)
                    )
                return product

            out = builder.bitcast(element(13, to), floats.as_pointer())
            places = [builder.gep(out, [ir.Constant(_I32, i)]) for i in range(2 * ROWS)]

            def dots(source: int, row_source: int, count: Any, block: Any) -> list[Any]:
                at = builder.add(times(tile, total), block)
                panel = element(source, times(at, count, 2 * LANES))
                starts = [builder.add(times(row, total), block) for row in row_numbers]
                rows = [element(row_source, times(start, count, 2)) for start in starts]
                return _integer_dots(builder, panel, rows, count)

            def scaled(source: int, row_source: int, integers: list[Any], block: Any) -> list[Any]:
                at = times(builder.add(times(tile, total), block), LANES)
                lanes = builder.bitcast(element(source, at), floats.as_pointer())
                columns = [
                    builder.load(builder.gep(lanes, [ir.Constant(_I32, h)]), align=4) for h in range(2)
                ]
                values = []
                for r, row in enumerate(row_numbers):
                    scale = builder.load(element(row_source, builder.add(times(row, total), block)))
                    for h in range(2):
                        both = builder.fmul(_splat(builder, scale, HALF), columns[h])
                        values.append(builder.fmul(both, builder.sitofp(integers[2 * r + h], floats)))
                return values

            def step(index: Any, before: list[Any]) -> list[Any]:
                block = builder.add(first, index)
                terms = scaled(2, 7, dots(0, 5, pairs, block), block)
                if with_minimum:
                    offsets = scaled(3, 8, dots(1, 6, extra_pairs, block), block)
                    terms = [builder.fsub(term, offset) for term, offset in zip(terms, offsets, strict=True)]
                return [builder.fadd(value, term) for value, term in zip(before, terms, strict=True)]

            start = [builder.load(place, align=4) for place in places]
            for place, value in zip(places, _plain_loop(builder, n_blocks, start, step), strict=True):
                builder.store(value, place, align=4)
            return context.get_dummy_value()

        return result, generate

    return intrinsic(define)


# ``sums[r, lane] += (rows_scale * panel_scale) * f32(dot)``, block after block, where ``dot`` is the exact
# integer dot product of the block; with minima ``... - (rows_offset * panel_offset) * f32(dot of extras)``
# is added in its place. Each operation is rounded to f32.
#
# Panels are [tile, total_blocks, ...]: i16[pairs, LANES, 2], extras i16[extra_pairs, LANES, 2], f32[LANES].
# Rows are [row, total_blocks, ...]: i16[2 * pairs], extras i16[2 * extra_pairs], f32.
accumulate_blocks = _accumulate_blocks(with_minimum=False)
accumulate_blocks_with_minimum = _accumulate_blocks(with_minimum=True)


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
