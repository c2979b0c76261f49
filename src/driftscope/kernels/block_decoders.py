"""How each block format becomes vectors of small integers, written once for every integer kernel.

The functions take a builder and a pointer to a block and give vectors in the intermediate language: quants
32 at a time in the order of the columns, scales and minima as i16. Layouts: ggml-common.h and ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from driftscope.kernels import ir
from driftscope.kernels.ir import I8, I16, I32, Builder, Value, constant, vector

# The 16 levels of IQ4_NL and IQ4_XS, and twice the 16 values of an E2M1 float (MXFP4).
IQ4_LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
E2M1_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)

Vectors = Callable[[Builder, Value], list[Value]]
Integers = Callable[[Builder, Value], Value]


@dataclass(frozen=True)
class Decoder:
    """A block format.

    Attributes:
        quants: the integers of a block, unsigned with `bias` added, or signed where `bias` is 0 and
            `signed` is set.
        bias: what is added to every quant to make it unsigned.
        largest: the largest unsigned quant; 0 for signed ones, which may be anything that i8 holds.
        d: kind (``f16``, ``f32`` or ``e8m0``) and byte of the block's scale.
        dmin: byte of the f16 that scales the minima (or is the minimum); -1 where there is none.
        scales: i16 scale of every sub-block; None where there is none.
        mins: i16 minimum of every sub-block; None where there is none.
        levels: whether signed quants are levels of a table, all above -128.
    """

    quants: Vectors
    bias: int
    largest: int
    d: tuple[str, int]
    dmin: int = -1
    scales: Integers | None = None
    mins: Integers | None = None
    levels: bool = False


def _bytes(builder: Builder, block: Value, at: int, count: int) -> Value:
    return ir.load(builder, ir.offset(builder, block, at), vector(I8, count))


def _and(builder: Builder, value: Value, mask: int) -> Value:
    return builder.and_(value, constant(value.type.element, mask, value.type.count))


def _shift(builder: Builder, value: Value, right: int) -> Value:
    """Shifted to the right, or to the left if negative."""
    if right == 0:
        return value
    by = constant(value.type.element, abs(right), value.type.count)
    return builder.lshr(value, by) if right > 0 else builder.shl(value, by)


def _bits(builder: Builder, value: Value, low: int, mask: int, to: int = 0) -> Value:
    """The bits of `mask` from bit `low` on, moved to bit `to`."""
    return _and(builder, _shift(builder, value, low - to), mask << to)


def _nibbles(builder: Builder, block: Value, at: int) -> Value:
    """32 quants of 16 bytes: the low halves, then the high halves."""
    packed = _bytes(builder, block, at, 16)
    return ir.concat(builder, _bits(builder, packed, 0, 15), _bits(builder, packed, 4, 15))


def _fifth_bits(builder: Builder, block: Value, at: int) -> Value:
    """16 for every set bit of 32."""
    bits = ir.load(builder, ir.offset(builder, block, at), I32)
    mask = builder.bitcast(bits, vector(ir.I1, 32))
    return builder.select(mask, constant(I8, 16, 32), constant(I8, 0, 32))


def _simple(at: int) -> Vectors:
    return lambda builder, block: [_nibbles(builder, block, at)]


def _with_fifth(at: int) -> Vectors:
    return lambda builder, block: [
        builder.or_(_nibbles(builder, block, at), _fifth_bits(builder, block, at - 4))
    ]


def _whole(at: int, count: int) -> Vectors:
    return lambda builder, block: [_bytes(builder, block, at + 32 * i, 32) for i in range(count)]


def _levels(table: list[int], at: int, count: int) -> Vectors:
    return lambda builder, block: [
        ir.look_up(builder, table, _nibbles(builder, block, at + 16 * i)) for i in range(count)
    ]


def _q2_k(builder: Builder, block: Value) -> list[Value]:
    packed = [_bytes(builder, block, 16 + 32 * half, 32) for half in range(2)]
    return [_bits(builder, part, 2 * j, 3) for part in packed for j in range(4)]


def _q3_k(builder: Builder, block: Value) -> list[Value]:
    packed = [_bytes(builder, block, 32 + 32 * half, 32) for half in range(2)]
    third = _bytes(builder, block, 0, 32)
    return [
        builder.or_(_bits(builder, packed[i // 4], 2 * (i % 4), 3), _bits(builder, third, i, 1, to=2))
        for i in range(8)
    ]


def _q4_k(builder: Builder, block: Value) -> list[Value]:
    packed = [_bytes(builder, block, 16 + 32 * j, 32) for j in range(4)]
    return [_bits(builder, part, low, 15) for part in packed for low in (0, 4)]


def _q5_k(builder: Builder, block: Value) -> list[Value]:
    packed = [_bytes(builder, block, 48 + 32 * j, 32) for j in range(4)]
    fifth = _bytes(builder, block, 16, 32)
    return [
        builder.or_(_bits(builder, packed[i // 2], 4 * (i % 2), 15), _bits(builder, fifth, i, 1, to=4))
        for i in range(8)
    ]


def _q6_k(builder: Builder, block: Value) -> list[Value]:
    found = []
    for half in range(2):
        low = [_bytes(builder, block, 64 * half + 32 * i, 32) for i in range(2)]
        high = _bytes(builder, block, 128 + 32 * half, 32)
        found += [
            builder.or_(_bits(builder, low[i % 2], 4 * (i // 2), 15), _bits(builder, high, 2 * i, 3, to=4))
            for i in range(4)
        ]
    return found


def _six_bits(first: bool) -> Integers:
    """The eight scales (or minima) of Q4_K and Q5_K, from 12 bytes (get_scale_min_k4)."""

    def define(builder: Builder, block: Value) -> Value:
        packed = _bytes(builder, block, 0, 16)
        # Low bits: scales 0-3, scales 4-7, minima 0-3, minima 4-7; then the two high bits of the second
        # and the fourth four.
        low = ir.pick(builder, packed, (4, 5, 6, 7, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15))
        moved = ir.shuffle(builder, low, _shift(builder, low, 4), (*range(12), *range(28, 32)))
        moved = builder.and_(moved, constant(I8, [63] * 4 + [15] * 4 + [63] * 4 + [15] * 4))
        high = ir.pick(builder, packed, (4, 5, 6, 7) * 2 + (8, 9, 10, 11) * 2)
        high = builder.and_(_shift(builder, high, 2), constant(I8, ([0] * 4 + [48] * 4) * 2))
        wide = builder.zext(builder.or_(moved, high), vector(I16, 16))
        return ir.pick(builder, wide, range(8) if first else range(8, 16))

    return define


def _q2_k_scales(low: int) -> Integers:
    return lambda builder, block: builder.zext(
        _bits(builder, _bytes(builder, block, 0, 16), low, 15), vector(I16, 16)
    )


def _q3_k_scales(builder: Builder, block: Value) -> Value:
    eight, four = _bytes(builder, block, 96, 8), _bytes(builder, block, 104, 4)
    low = ir.concat(builder, _bits(builder, eight, 0, 15), _bits(builder, eight, 4, 15))
    parts = [_bits(builder, four, 2 * i, 3, to=4) for i in range(4)]
    high = ir.concat(builder, ir.concat(builder, *parts[:2]), ir.concat(builder, *parts[2:]))
    return builder.sub(builder.zext(builder.or_(low, high), vector(I16, 16)), constant(I16, 32, 16))


def _q6_k_scales(builder: Builder, block: Value) -> Value:
    return builder.sext(_bytes(builder, block, 192, 16), vector(I16, 16))


def _iq4_xs_scales(builder: Builder, block: Value) -> Value:
    packed = _bytes(builder, block, 4, 4)
    mixed = ir.concat(builder, _bits(builder, packed, 0, 15), _bits(builder, packed, 4, 15))
    low = builder.zext(ir.pick(builder, mixed, (0, 4, 1, 5, 2, 6, 3, 7)), vector(I16, 8))
    two = ir.splat(builder, ir.load(builder, ir.offset(builder, block, 2), I16), 8)
    high = _and(builder, builder.lshr(two, constant(I16, list(range(0, 16, 2)))), 3)
    return builder.sub(builder.or_(low, _shift(builder, high, -4)), constant(I16, 32, 8))


_HALF = ("f16", 0)
_LEVELS = [int(level) for level in IQ4_LEVELS]
_E2M1 = [int(level) + 12 for level in E2M1_DOUBLED]

DECODERS: dict[str, Decoder] = {
    "Q4_0": Decoder(_simple(2), 8, 15, _HALF),
    "Q4_1": Decoder(_simple(4), 0, 15, _HALF, 2),
    "Q5_0": Decoder(_with_fifth(6), 16, 31, _HALF),
    "Q5_1": Decoder(_with_fifth(8), 0, 31, _HALF, 2),
    "Q8_0": Decoder(_whole(2, 1), 0, 0, _HALF),
    "Q2_K": Decoder(_q2_k, 0, 3, ("f16", 80), 82, _q2_k_scales(0), _q2_k_scales(4)),
    "Q3_K": Decoder(_q3_k, 4, 7, ("f16", 108), -1, _q3_k_scales),
    "Q4_K": Decoder(_q4_k, 0, 15, _HALF, 2, _six_bits(True), _six_bits(False)),
    "Q5_K": Decoder(_q5_k, 0, 31, _HALF, 2, _six_bits(True), _six_bits(False)),
    "Q6_K": Decoder(_q6_k, 32, 63, ("f16", 208), -1, _q6_k_scales),
    "Q8_K": Decoder(_whole(4, 8), 0, 0, ("f32", 0)),
    "IQ4_NL": Decoder(_levels(_LEVELS, 2, 1), 0, 0, _HALF, levels=True),
    "IQ4_XS": Decoder(_levels(_LEVELS, 8, 8), 0, 0, _HALF, -1, _iq4_xs_scales, levels=True),
    "MXFP4": Decoder(_levels(_E2M1, 1, 1), 12, 24, ("e8m0", 0)),
}


def block_scales(builder: Builder, decoder: Decoder, blocks: list[Value]) -> Value:
    """The scales of several blocks, a vector of f32."""
    kind, at = decoder.d
    if kind == "f16":
        return half_at(builder, blocks, at)
    pointers = [ir.offset(builder, block, at) for block in blocks]
    count = len(blocks)
    if kind == "f32":
        return _gather(builder, [ir.load(builder, pointer, ir.F32) for pointer in pointers])
    exponents = builder.zext(
        _gather(builder, [ir.load(builder, pointer, I8) for pointer in pointers]), vector(I32, count)
    )
    # Half of the power of two that an E8M0 byte stands for (ggml_e8m0_to_fp32_half).
    normal = _shift(builder, builder.sub(exponents, constant(I32, 1, count)), -23)
    tiny = builder.shl(constant(I32, 0x00200000, count), _and(builder, exponents, 1))
    small = builder.icmp_unsigned("<", exponents, constant(I32, 2, count))
    return builder.bitcast(builder.select(small, tiny, normal), vector(ir.F32, count))


def half_at(builder: Builder, blocks: list[Value], at: int) -> Value:
    """The f16 at byte `at` of several blocks, as a vector of f32."""
    halfs = [ir.load(builder, ir.offset(builder, block, at), I16) for block in blocks]
    return ir.half_to_float(builder, _gather(builder, halfs))


def _gather(builder: Builder, scalars: list[Value]) -> Value:
    found = ir.ir.Constant(vector(scalars[0].type, len(scalars)), ir.ir.Undefined)
    for i, scalar in enumerate(scalars):
        found = builder.insert_element(found, scalar, I32(i))
    return found
