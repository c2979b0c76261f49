"""Vector operations in LLVM's intermediate language: the words that intrinsics of kernels are written in.

Plain operations without a fast-math flag, which LLVM lowers to what the target has, with the same results
everywhere. Where an instruction of x86 that LLVM does not find by itself is worth it, a function here has
both forms, and takes the special one only if `driftscope.kernels.instructions` allows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from llvmlite import ir

from driftscope.kernels import instructions

I1, I8, I16, I32, I64 = (ir.IntType(width) for width in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()

# Values and types of llvmlite, which has no types of its own for mypy.
Value = Any
Builder = Any


def vector(item: Value, count: int) -> Value:
    """The type of a vector."""
    return ir.VectorType(item, count)


def constant(item: Value, values: Sequence[float] | float, count: int = 0) -> Value:
    """A vector of constants, or of `count` times the same."""
    listed = list(values) if isinstance(values, Sequence) else [values] * count
    return ir.Constant(vector(item, len(listed)), listed)


def zeros(kind: Value) -> Value:
    """A vector of zeros."""
    return ir.Constant(kind, [0] * kind.count)


def element(context: Any, builder: Builder, array_type: Any, array: Value, index: Value) -> Value:
    """Pointer to element `index` of a C-contiguous array, counted over all its dimensions."""
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [index])


def offset(builder: Builder, pointer: Value, count: int | Value) -> Value:
    """The pointer `count` elements further."""
    return builder.gep(pointer, [I64(count) if isinstance(count, int) else count])


def load(builder: Builder, pointer: Value, kind: Value) -> Value:
    """A value of any type from a pointer of any type, aligned or not."""
    return builder.load(builder.bitcast(pointer, kind.as_pointer()), align=1)


def store(builder: Builder, value: Value, pointer: Value) -> None:
    """A value of any type to a pointer of any type, aligned or not."""
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=1)


def shuffle(builder: Builder, a: Value, b: Value, picks: Iterable[int]) -> Value:
    """Elements of `a` and `b`, counted through."""
    return builder.shuffle_vector(a, b, constant(I32, list(picks)))


def pick(builder: Builder, a: Value, picks: Iterable[int]) -> Value:
    """Elements of `a`."""
    return shuffle(builder, a, ir.Constant(a.type, ir.Undefined), picks)


def concat(builder: Builder, a: Value, b: Value) -> Value:
    """`a` followed by `b`."""
    return shuffle(builder, a, b, range(2 * a.type.count))


def halves(builder: Builder, a: Value) -> tuple[Value, Value]:
    """The first and the second half."""
    half = a.type.count // 2
    return pick(builder, a, range(half)), pick(builder, a, range(half, 2 * half))


def splat(builder: Builder, scalar: Value, count: int) -> Value:
    """A vector of `count` times `scalar`."""
    start = ir.Constant(vector(scalar.type, count), ir.Undefined)
    return pick(builder, builder.insert_element(start, scalar, I32(0)), [0] * count)


def both_ways(builder: Builder, value: Value) -> Value:
    """A vector twice over, so that a shuffle within 128 bits reaches every element."""
    return concat(builder, value, value)


def prefetch(builder: Builder, pointer: Value) -> None:
    """Ask for the cache line of an address that will be read soon; it need not exist."""
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
    function = builder.module.declare_intrinsic("llvm.prefetch.p0", (), kind)
    builder.call(function, [pointer, I32(0), I32(3), I32(1)])


def spread(builder: Builder, words: Value, index: int) -> Value:
    """Word `index` of each half of sixteen i16 in every word of that half."""
    if instructions.integer_dots() == instructions.PORTABLE:
        return pick(builder, words, [index] * 8 + [8 + index] * 8)
    mask = constant(I8, [2 * index, 2 * index + 1] * 16)
    found = _look_up_bytes(builder, builder.bitcast(words, vector(I8, 32)), mask)
    return builder.bitcast(found, words.type)


def _look_up_bytes(builder: Builder, table: Value, indices: Value) -> Value:
    kind = vector(I8, 32)
    function = builder.module.declare_intrinsic(
        "llvm.x86.avx2.pshuf.b", (), ir.FunctionType(kind, [kind] * 2)
    )
    return builder.call(function, [table, indices])


def look_up(builder: Builder, table: Sequence[int], indices: Value) -> Value:
    """``table[i]`` for a vector of i8 indices below 16."""
    count = indices.type.count
    if instructions.integer_dots() != instructions.PORTABLE and count == 32:
        return _look_up_bytes(builder, constant(I8, [*table, *table]), indices)
    values = [constant(I8, value, count) for value in table]
    for bit in range(4):
        mask = builder.and_(indices, constant(I8, 1 << bit, count))
        chosen = builder.icmp_signed("!=", mask, zeros(indices.type))
        values = [
            builder.select(chosen, odd, even) for even, odd in zip(values[::2], values[1::2], strict=True)
        ]
    return values[0]


def multiply_pairs(builder: Builder, a: Value, b: Value) -> Value:
    """i16 times i16, neighbours added: i32, exact (x86: vpmaddwd)."""
    count = a.type.count
    if instructions.integer_dots() != instructions.PORTABLE and count == 16:
        # LLVM finds it by itself, but not where it has hoisted the extension of one factor.
        kind = ir.FunctionType(vector(I32, 8), [a.type] * 2)
        return builder.call(builder.module.declare_intrinsic("llvm.x86.avx2.pmadd.wd", (), kind), [a, b])
    wide = vector(I32, count)
    products = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
    return builder.add(
        pick(builder, products, range(0, count, 2)), pick(builder, products, range(1, count, 2))
    )


def multiply_bytes(builder: Builder, unsigned: Value, signed: Value) -> Value:
    """u8 times i8, neighbours added: i16. The caller sees to it that the sums fit (x86: vpmaddubsw)."""
    count = unsigned.type.count
    words = vector(I16, count // 2)
    if instructions.integer_dots() != instructions.PORTABLE and count == 32:
        function = builder.module.declare_intrinsic(
            "llvm.x86.avx2.pmadd.ub.sw", (), ir.FunctionType(words, [unsigned.type] * 2)
        )
        return builder.call(function, [unsigned, signed])
    eight = constant(I16, 8, count // 2)
    u, s = builder.bitcast(unsigned, words), builder.bitcast(signed, words)
    even = builder.mul(
        builder.and_(u, constant(I16, 255, count // 2)), builder.ashr(builder.shl(s, eight), eight)
    )
    return builder.add(even, builder.mul(builder.lshr(u, eight), builder.ashr(s, eight)))


def has_signs() -> bool:
    """Whether `with_sign` is there."""
    return instructions.integer_dots() != instructions.PORTABLE


def with_sign(builder: Builder, values: Value, signs: Value) -> Value:
    """32 i8, negated where `signs` is negative, 0 where it is 0 (vpsignb)."""
    kind = ir.FunctionType(values.type, [values.type] * 2)
    return builder.call(builder.module.declare_intrinsic("llvm.x86.avx2.psign.b", (), kind), [values, signs])


def add_dots(builder: Builder, total: Value, unsigned: Value, signed: Value) -> Value:
    """i32 plus the sums of four products u8 times i8 (vpdpbusd); for targets with VNNI."""
    count = total.type.count
    name = f"llvm.x86.avx512.vpdpbusd.{32 * count}"
    function = builder.module.declare_intrinsic(name, (), ir.FunctionType(total.type, [total.type] * 3))
    return builder.call(
        function, [total, builder.bitcast(unsigned, total.type), builder.bitcast(signed, total.type)]
    )


def half_to_float(builder: Builder, halfs: Value) -> Value:
    """A vector of the bits of f16, as f32. (What becomes of a NaN's payload is not said.)"""
    count = halfs.type.count
    floats = vector(F32, count)
    if "f16c" in instructions.features():
        return builder.fpext(builder.bitcast(halfs, vector(F16, count)), floats)
    words = vector(I32, count)
    bits = builder.zext(halfs, words)
    magnitude = builder.shl(builder.and_(bits, constant(I32, 0x7FFF, count)), constant(I32, 13, count))
    # The shifted bits are the value times 2^-112, subnormals included.
    finite = builder.bitcast(
        builder.fmul(builder.bitcast(magnitude, floats), constant(F32, 2.0**112, count)), words
    )
    largest = constant(I32, 0x0F800000, count)
    special = builder.icmp_unsigned(">=", magnitude, largest)
    magnitude = builder.select(special, builder.or_(magnitude, constant(I32, 0x7F800000, count)), finite)
    sign = builder.shl(builder.and_(bits, constant(I32, 0x8000, count)), constant(I32, 16, count))
    return builder.bitcast(builder.or_(magnitude, sign), floats)


def loop(
    builder: Builder, count: Value, initial: list[Value], step: Callable[..., list[Value]]
) -> list[Value]:
    """``for k in range(count): values = step(k, values)``, with values in registers."""
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


def horizontal_sums(builder: Builder, rows: list[Value]) -> Value:
    """The sums of eight vectors of eight i32, or of eight of four, in order."""
    if rows[0].type.count == 4:
        rows = [concat(builder, rows[i], rows[i + 4]) for i in range(4)]

    def neighbours(a: Value, b: Value) -> Value:
        even = shuffle(builder, a, b, (0, 2, 8, 10, 4, 6, 12, 14))
        odd = shuffle(builder, a, b, (1, 3, 9, 11, 5, 7, 13, 15))
        return builder.add(even, odd)

    four = len(rows) == 4
    while len(rows) > (1 if four else 2):
        rows = [neighbours(a, b) for a, b in zip(rows[::2], rows[1::2], strict=True)]
    if four:
        return rows[0]
    low = shuffle(builder, rows[0], rows[1], (0, 1, 2, 3, 8, 9, 10, 11))
    return builder.add(low, shuffle(builder, rows[0], rows[1], (4, 5, 6, 7, 12, 13, 14, 15)))
