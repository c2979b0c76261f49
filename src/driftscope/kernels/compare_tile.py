"""The innermost step of a comparison, as vector code that LLVM does not find by itself.

LLVM does not vectorise a float sum, because that changes its order; here the order is written out, so it is
the same on every host, whatever the width of its registers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

SMALL, MEDIUM = 1e-3, 1e-2
"""Bounds of the published difference classes: small is below the first, medium below the second."""

LANES, STEPS = 4, 8
TILE = LANES * STEPS
"""A tile is a straight run of instructions: `STEPS` vectors of `LANES` values of either side."""

SUMS, COUNTS = 8, 5
"""Rows of the accumulators, each of `LANES`; see `add_tile`."""


def _load(source: Any, width: int) -> Any:
    """Code generator for the little-endian unsigned integer of `width` bits at any byte of a row."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, at = arguments
        data = context.make_array(signature.args[0])(context, builder, row).data
        pointer = builder.bitcast(builder.gep(data, [at]), ir.IntType(width).as_pointer())
        return builder.load(pointer, align=1)

    result = types.uint32 if width == 32 else types.uint16
    return result(source, types.intp), generate


def _load_u32(_context: Any, row: Any, at: Any) -> Any:
    """The u32 at byte `at`."""
    return _load(row, 32)


def _load_u16(_context: Any, row: Any, at: Any) -> Any:
    """The u16 at byte `at`."""
    return _load(row, 16)


def _add_tile(
    _context: Any, a: Any, b: Any, start: Any, shift_a: Any, shift_b: Any, sums: Any, counts: Any
) -> Any:
    """Add `TILE` pairs to the accumulators, `LANES` at a time, without a branch.

    Lane l adds pairs l, l + LANES, ... . Rows of `sums`, each of `LANES`: a - shift_a,
    b - shift_b, their squares, their product, |a - b|, (a - b)^2, and the largest |a - b|. Rows of `counts`:
    pairs that are finite, equal, below `SMALL`, below `MEDIUM`, and the bits that differed.
    """
    result = types.void(a, b, types.intp, types.float64, types.float64, sums, counts)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        single, whole = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(32), LANES)
        double, wide = ir.VectorType(ir.DoubleType(), LANES), ir.VectorType(ir.IntType(64), LANES)

        def pointer(argument: int, index: Any, vector: Any) -> Any:
            array = context.make_array(signature.args[argument])(context, builder, arguments[argument])
            return builder.bitcast(builder.gep(array.data, [index]), vector.as_pointer())

        def row(index: int) -> Any:
            return ir.Constant(ir.IntType(64), index * LANES)

        def splat(scalar: Any) -> Any:
            vector = builder.insert_element(
                ir.Constant(double, ir.Undefined), scalar, ir.Constant(whole.element, 0)
            )
            return builder.shuffle_vector(vector, vector, ir.Constant(whole, [0] * LANES))

        def constant(value: float) -> Any:
            return ir.Constant(double, [value] * LANES)

        magnitude = ir.Constant(wide, [(1 << 63) - 1] * LANES)
        total = [builder.load(pointer(5, row(i), double), align=8) for i in range(SUMS)]
        count = [builder.load(pointer(6, row(i), wide), align=8) for i in range(COUNTS)]
        shift_x, shift_y = splat(arguments[3]), splat(arguments[4])
        for step in range(STEPS):
            at = builder.add(arguments[2], row(step))
            a_values = builder.load(pointer(0, at, single), align=4)
            b_values = builder.load(pointer(1, at, single), align=4)
            unequal = builder.xor(builder.bitcast(a_values, whole), builder.bitcast(b_values, whole))
            x, y = builder.fpext(a_values, double), builder.fpext(b_values, double)
            signed = builder.bitcast(builder.fsub(x, y), wide)
            d = builder.bitcast(builder.and_(signed, magnitude), double)
            # A difference of two f32 is finite in f64 if and only if both are finite.
            bounds = [("<=", np.finfo(np.float64).max), ("==", 0.0), ("<", SMALL), ("<", MEDIUM)]
            holds = [builder.fcmp_ordered(how, d, constant(float(bound))) for how, bound in bounds]
            x, y, d = (
                builder.select(holds[0], value, constant(0.0))
                for value in (builder.fsub(x, shift_x), builder.fsub(y, shift_y), d)
            )
            products = [builder.fmul(*pair) for pair in ((x, x), (y, y), (x, y), (d, d))]
            for i, term in enumerate((x, y, *products[:3], d, products[3])):
                total[i] = builder.fadd(total[i], term)
            total[7] = builder.select(builder.fcmp_ordered(">", d, total[7]), d, total[7])
            for i, mask in enumerate(holds):
                count[i] = builder.sub(count[i], builder.sext(mask, wide))
            count[4] = builder.or_(count[4], builder.zext(unequal, wide))
        for i, vector in enumerate(total):
            builder.store(vector, pointer(5, row(i), double), align=8)
        for i, vector in enumerate(count):
            builder.store(vector, pointer(6, row(i), wide), align=8)
        return context.get_dummy_value()

    return result, generate


load_u32: Any = intrinsic(_load_u32)
load_u16: Any = intrinsic(_load_u16)
add_tile: Any = intrinsic(_add_tile)
