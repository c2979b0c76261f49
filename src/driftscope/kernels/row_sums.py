"""Weighted sums of the rows of a matrix, sixteen columns a vector, written in LLVM's intermediate language.

Both products of attention are such sums: scores of keys that are stored channel by channel, and values
weighted by the softmax. The rows are added one after the other, each product and each sum rounded, and a
vector runs across columns: the order of a column's sum is that of the rows, whatever the host.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types

from driftscope.kernels.jit import device, intrinsic
from driftscope.kernels.moments import LANES, over

_I32, _FLOAT = ir.IntType(32), ir.FloatType()
_FLOATS = ir.VectorType(_FLOAT, LANES)

# Vectors of columns that are summed at once: their sums fill half of the registers of AVX2.
_AT_ONCE = 4


def _weighted_rows(vectors: int) -> Any:
    def define(_context: Any, weights: Any, rows: Any, first: Any, stop: Any, column: Any, out: Any) -> Any:
        result = types.void(weights, rows, types.intp, types.intp, types.intp, out)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            weights, rows, first, stop, column, out = arguments
            kinds = signature.args
            factors = context.make_array(kinds[0])(context, builder, weights).data
            matrix = context.make_array(kinds[1])(context, builder, rows)
            width = builder.extract_value(matrix.shape, 1)
            target = context.make_array(kinds[5])(context, builder, out).data
            same = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)

            def vector(pointer: Any, index: Any) -> Any:
                return builder.bitcast(builder.gep(pointer, [index]), _FLOATS.as_pointer())

            def step(k: Any, before: list[Any]) -> list[Any]:
                row = builder.add(first, k)
                factor = builder.load(builder.gep(factors, [row]))
                factor = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), factor, _I32(0))
                factor = builder.shuffle_vector(factor, factor, same)
                start = vector(matrix.data, builder.add(builder.mul(row, width), column))
                return [
                    builder.fadd(
                        total, builder.fmul(factor, builder.load(builder.gep(start, [_I32(i)]), align=4))
                    )
                    for i, total in enumerate(before)
                ]

            zeros = [ir.Constant(_FLOATS, [0.0] * LANES)] * vectors
            sums = over(builder, builder.sub(stop, first), zeros, step)
            start = vector(target, column)
            for i, total in enumerate(sums):
                builder.store(total, builder.gep(start, [_I32(i)]), align=4)
            return context.get_dummy_value()

        return result, generate

    return intrinsic(define)


_four_vectors = _weighted_rows(_AT_ONCE)
_one_vector = _weighted_rows(1)


@device
def weighted_rows(weights, rows, first, stop, left, right, out):  # type: ignore[no-untyped-def]
    """``out[c] = sum of weights[r] * rows[r, c]`` over some rows, for some columns.

    Args:
        weights: f32[n].
        rows: f32[n, m], C-contiguous.
        first: first row.
        stop: the row after the last one.
        left: first column.
        right: the column after the last one.
        out: f32[m], contiguous. Columns that share a sixteen with one that is asked for may be written too;
            it is fastest where `rows` and `out` have a multiple of sixteen columns.
    """
    column = left - left % LANES
    columns = min(rows.shape[1], out.shape[0])
    while column + _AT_ONCE * LANES <= right:
        _four_vectors(weights, rows, first, stop, column, out)
        column += _AT_ONCE * LANES
    while column < right and column + LANES <= columns:
        _one_vector(weights, rows, first, stop, column, out)
        column += LANES
    for c in range(column, right):
        total = np.float32(0.0)
        for r in range(first, stop):
            total += weights[r] * rows[r, c]
        out[c] = total
