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
