"""Vector operations of the f32 products, written in LLVM's intermediate language.

Plain vector instructions with no fast-math flag: no fused
multiply-add, so the results are the same on every host. Sixteen rows of weights lie side by side in a
panel ``f32[k, LANES]``; a vector runs across rows and never along one.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.registry import cpu_target

from driftscope.kernels.jit import intrinsic

# Rows side by side in a panel; two vectors of eight in AVX2, one of sixteen in AVX-512.
LANES = 16
# Panels that are worked on together, and the rows in them.
PANELS = 2
WIDTH = PANELS * LANES
# Columns that are worked on at a time. Partial sums are stored between them, so this does not change the
# order of accumulation.
DEPTH = 512
_EIGHT = 8

_I8, _I32, _FLOAT = ir.IntType(8), ir.IntType(32), ir.FloatType()
_FLOATS, _INTS = ir.VectorType(_FLOAT, _EIGHT), ir.VectorType(_I32, _EIGHT)


def _pointer(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    """Pointer to element `index` of a C-contiguous array."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


def _load(builder: Any, pointer: Any, vector: Any, align: int) -> Any:
    return builder.load(builder.bitcast(pointer, vector.as_pointer()), align=align)


def _store(builder: Any, values: Any, pointer: Any, align: int) -> None:
    builder.store(values, builder.bitcast(pointer, values.type.as_pointer()), align=align)


def _shuffle(builder: Any, a: Any, b: Any, order: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(order)), order))


def _ints(value: int) -> Any:
    return ir.Constant(_INTS, [value] * _EIGHT)


def _splat(builder: Any, scalar: Any, count: int) -> Any:
    vector = ir.Constant(ir.VectorType(scalar.type, count), ir.Undefined)
    vector = builder.insert_element(vector, scalar, ir.Constant(_I32, 0))
    return _shuffle(builder, vector, vector, [0] * count)


def _interleave(builder: Any, a: Any, b: Any, size: int) -> tuple[Any, Any]:
    """Runs of `size` elements of `a` and `b` by turns, within halves of 16 bytes as x86 does it."""
    count = a.type.count
    lane = count // 2 if a.type.element == _FLOAT else count
    parts = []
    for upper in (0, lane // 2):
        order: list[int] = []
        for start in range(0, count, lane):
            for run in range(0, lane // 2, size):
                at = start + upper + run
                order += [*range(at, at + size), *range(count + at, count + at + size)]
        parts.append(_shuffle(builder, a, b, order))
    return parts[0], parts[1]


def _transposed_floats(builder: Any, rows: list[Any]) -> list[Any]:
    """The columns of eight vectors of eight f32."""
    pairs = [_interleave(builder, rows[i], rows[i + 1], 1) for i in range(0, 8, 2)]
    quads = []
    for i in (0, 2):
        for half in (0, 1):
            quads.append(_interleave(builder, pairs[i][half], pairs[i + 1][half], 2))
    # quads[0], [1]: columns 0, 1 | 4, 5 and 2, 3 | 6, 7 of rows 0..3; quads[2], [3]: of rows 4..7.
    columns: list[Any] = [None] * 8
    for half in (0, 1):
        for which in (0, 1):
            top, bottom = quads[half][which], quads[2 + half][which]
            c = 2 * half + which
            columns[c] = _shuffle(builder, top, bottom, [0, 1, 2, 3, 8, 9, 10, 11])
            columns[c + 4] = _shuffle(builder, top, bottom, [4, 5, 6, 7, 12, 13, 14, 15])
    return columns


def _multiply(tokens: int, panels: int) -> Any:
    """A tile: `tokens` rows of activations by `panels` panels of LANES rows of weights."""

    def define(_context: Any, panel: Any, x: Any, x_at: Any, sums: Any, to: Any, count: Any) -> Any:
        size = types.intp
        result = types.void(panel, x, size, sums, size, size)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            panel, x, x_at, sums, to, count = arguments
            zero = x_at.type(0)
            base = _pointer(context, builder, signature.args[0], panel, zero)
            row = _pointer(context, builder, signature.args[1], x, x_at)
            total = _pointer(context, builder, signature.args[3], sums, to)
            vectors = [p * DEPTH * LANES + h * _EIGHT for p in range(panels) for h in range(2)]
            places = [
                builder.gep(total, [zero.type((p * tokens + t) * LANES + h * _EIGHT)])
                for t in range(tokens)
                for p in range(panels)
                for h in range(2)
            ]

            def one(k: Any, before: list[Any]) -> list[Any]:
                at = builder.gep(base, [builder.shl(k, k.type(4))])
                columns = [_load(builder, builder.gep(at, [k.type(v)]), _FLOATS, 4) for v in vectors]
                value = builder.gep(row, [builder.mul(k, k.type(tokens))])
                after = []
                for t in range(tokens):
                    single = builder.load(builder.gep(value, [k.type(t)]), align=4)
                    factor = _splat(builder, single, _EIGHT)
                    for c, column in enumerate(columns):
                        term = builder.fmul(factor, column)
                        after.append(builder.fadd(before[t * len(columns) + c], term))
                return after

            start = [_load(builder, place, _FLOATS, 4) for place in places]
            for place, value in zip(places, _loop(builder, count, start, one), strict=True):
                _store(builder, value, place, 4)
            return context.get_dummy_value()

        return result, generate

    return intrinsic(define)


# ``sums[t, r] += x[x_at + k * tokens + t] * panel[r // LANES, k, r % LANES]`` for k = 0 .. count - 1, in this
# order, each product and each sum rounded to f32. `panel` is f32[panels, DEPTH, LANES]; `sums`, from its
# element `to` on, f32[panels, tokens, LANES]; `count` is even and at least 2. Named after tokens and panels.
multiply_1x2 = _multiply(1, 2)
multiply_2x2 = _multiply(2, 2)
multiply_3x1 = _multiply(3, 1)
multiply_4x1 = _multiply(4, 1)
multiply_5x1 = _multiply(5, 1)
multiply_6x1 = _multiply(6, 1)


def _transposed_bytes(builder: Any, rows: list[Any]) -> list[Any]:
    """The sixteen columns, eight bytes each, of eight vectors of sixteen bytes."""
    pairs = [_interleave(builder, rows[i], rows[i + 1], 1) for i in range(0, 8, 2)]
    columns = []
    for half in (0, 1):
        top = _interleave(builder, pairs[0][half], pairs[1][half], 2)
        bottom = _interleave(builder, pairs[2][half], pairs[3][half], 2)
        for quarter in (0, 1):
            for two in _interleave(builder, top[quarter], bottom[quarter], 4):
                columns += [_shuffle(builder, two, two, list(range(h, h + 8))) for h in (0, 8)]
    return columns


def _spread_quants(offset: str) -> Any:
    def define(
        _context: Any,
        quants: Any,
        at: Any,
        step: Any,
        scales: Any,
        shifts: Any,
        scale_at: Any,
        panel: Any,
        to: Any,
    ) -> Any:
        size = types.intp
        result = types.void(quants, size, size, scales, shifts, size, panel, size)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            quants, at, step, scales, shifts, scale_at, panel, to = arguments
            kinds = signature.args
            base = _pointer(context, builder, kinds[0], quants, at)
            sixteen = ir.VectorType(_I8, 16)
            places = [builder.gep(base, [builder.mul(step, step.type(r))]) for r in range(_EIGHT)]
            columns = _transposed_bytes(builder, [_load(builder, place, sixteen, 1) for place in places])
            scale = _load(builder, _pointer(context, builder, kinds[3], scales, scale_at), _FLOATS, 4)
            shift = _load(builder, _pointer(context, builder, kinds[4], shifts, scale_at), _FLOATS, 4)
            target = _pointer(context, builder, kinds[6], panel, to)
            for c, column in enumerate(columns):
                values = builder.fmul(scale, builder.sitofp(column, _FLOATS))
                if offset == "subtract":
                    values = builder.fsub(values, shift)
                if offset == "add":
                    values = builder.fadd(values, shift)
                _store(builder, values, builder.gep(target, [to.type(c * LANES)]), 4)
            return context.get_dummy_value()

        return result, generate

    return intrinsic(define)


# ``panel[to + c * LANES + r] = scales[scale_at + r] * quants[at + r * step + c]``, then minus or plus
# ``shifts[scale_at + r]``, for eight rows r and sixteen columns c.
spread_quants = _spread_quants("none")
spread_quants_subtract = _spread_quants("subtract")
spread_quants_add = _spread_quants("add")


def _spread_scales(each: bool) -> Any:
    def define(
        _context: Any, scales: Any, at: Any, step: Any, d: Any, d_at: Any, d_step: Any, out: Any, to: Any
    ) -> Any:
        size = types.intp
        result = types.void(scales, size, size, d, size, size, out, size)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            scales, at, step, d, d_at, d_step, out, to = arguments
            kinds = signature.args
            source = _pointer(context, builder, kinds[0], scales, at)
            factors = _pointer(context, builder, kinds[3], d, d_at)
            rows = []
            for r in range(_EIGHT):
                place = builder.gep(source, [builder.mul(step, step.type(r))])
                integers = builder.sitofp(_load(builder, place, ir.VectorType(_I8, _EIGHT), 1), _FLOATS)
                factor = builder.gep(factors, [builder.mul(d_step, step.type(r))])
                if each:
                    rows.append(builder.fmul(_load(builder, factor, _FLOATS, 4), integers))
                else:
                    rows.append(builder.fmul(_splat(builder, builder.load(factor), _EIGHT), integers))
            target = _pointer(context, builder, kinds[6], out, to)
            for s, column in enumerate(_transposed_floats(builder, rows)):
                _store(builder, column, builder.gep(target, [to.type(s * WIDTH)]), 4)
            return context.get_dummy_value()

        return result, generate

    return intrinsic(define)


# ``out[to + s * WIDTH + r] = d[d_at + r * d_step] * scales[at + r * step + s]`` for eight rows r and eight
# sub-blocks s of one block; `spread_scales_each` where each is a block: ``d[d_at + r * d_step + s]``.
spread_scales = _spread_scales(each=False)
spread_scales_each = _spread_scales(each=True)


def _eight_floats(builder: Any, kind: str, place: Any) -> Any:
    """Eight stored numbers as f32."""
    if kind == "F32":
        return _load(builder, place, _FLOATS, 1)
    halves = _load(builder, place, ir.VectorType(ir.IntType(16), _EIGHT), 1)
    return _bfloat(builder, halves) if kind == "BF16" else _half(builder, halves)


def _spread_floats(kind: str) -> Any:
    def define(_context: Any, raw: Any, at: Any, step: Any, panel: Any, to: Any) -> Any:
        size = types.intp
        result = types.void(raw, size, size, panel, size)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            raw, at, step, panel, to = arguments
            source = _pointer(context, builder, signature.args[0], raw, at)
            places = [builder.gep(source, [builder.mul(step, step.type(r))]) for r in range(_EIGHT)]
            columns = _transposed_floats(builder, [_eight_floats(builder, kind, place) for place in places])
            target = _pointer(context, builder, signature.args[3], panel, to)
            for c, column in enumerate(columns):
                _store(builder, column, builder.gep(target, [to.type(c * LANES)]), 4)
            return context.get_dummy_value()

        return result, generate

    return intrinsic(define)


def _multiply_stored(kind: str) -> Any:
    item = 4 if kind == "F32" else 2

    def define(_context: Any, raw: Any, at: Any, step: Any, x: Any, sums: Any, eights: Any) -> Any:
        size = types.intp
        result = types.void(raw, size, size, x, sums, size)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            raw, at, step, x, sums, eights = arguments
            kinds, zero = signature.args, at.type(0)
            source = _pointer(context, builder, kinds[0], raw, at)
            factors = _pointer(context, builder, kinds[3], x, zero)
            total = _pointer(context, builder, kinds[4], sums, zero)
            places = [builder.gep(total, [zero.type(h)]) for h in range(0, LANES, _EIGHT)]
            rows = [builder.gep(source, [builder.mul(step, step.type(r))]) for r in range(LANES)]

            def one(eight: Any, before: list[Any]) -> list[Any]:
                k = builder.shl(eight, eight.type(3))
                value = builder.gep(factors, [k])
                splats = []
                for c in range(_EIGHT):
                    single = builder.load(builder.gep(value, [k.type(c)]), align=4)
                    splats.append(_splat(builder, single, _EIGHT))
                at = builder.mul(k, k.type(item))
                after = []
                for half, total in enumerate(before):
                    some = rows[half * _EIGHT : (half + 1) * _EIGHT]
                    values = [_eight_floats(builder, kind, builder.gep(row, [at])) for row in some]
                    for column, factor in zip(_transposed_floats(builder, values), splats, strict=True):
                        total = builder.fadd(total, builder.fmul(factor, column))
                    after.append(total)
                return after

            start = [_load(builder, place, _FLOATS, 4) for place in places]
            for place, total in zip(places, _loop(builder, eights, start, one, unroll=1), strict=True):
                _store(builder, total, place, 4)
            return context.get_dummy_value()

        return result, generate

    return intrinsic(define)


def _bfloat(builder: Any, halves: Any) -> Any:
    """Eight bf16 as f32."""
    return builder.bitcast(builder.shl(builder.zext(halves, _INTS), _ints(16)), _FLOATS)


def _half(builder: Any, halves: Any) -> Any:
    """Eight f16 as f32; the payload of a NaN is not specified."""
    # LLVM's own conversion needs a library where the target has no F16C.
    if "+f16c" in cpu_target.target_context.codegen().magic_tuple()[2].split(","):
        halves = builder.bitcast(halves, ir.VectorType(ir.HalfType(), _EIGHT))
        return builder.fpext(halves, _FLOATS)
    return _exact_half(builder, halves)


def _exact_half(builder: Any, halves: Any) -> Any:
    """Eight f16 as f32, NaNs bit for bit; the shifted bits are the value times 2^-112, subnormals too."""
    bits = builder.zext(halves, _INTS)
    magnitude = builder.shl(builder.and_(bits, _ints(0x7FFF)), _ints(13))
    scale = ir.Constant(_FLOATS, [2.0**112] * _EIGHT)
    finite = builder.bitcast(builder.fmul(builder.bitcast(magnitude, _FLOATS), scale), _INTS)
    special = builder.or_(magnitude, _ints(0xFF << 23))
    large = builder.icmp_unsigned(">=", magnitude, _ints(0x7C00 << 13))
    sign = builder.shl(builder.and_(bits, _ints(0x8000)), _ints(16))
    return builder.bitcast(builder.or_(builder.select(large, special, finite), sign), _FLOATS)


def _widen(convert: Any) -> Any:
    def define(_context: Any, raw: Any, at: Any, out: Any, to: Any) -> Any:
        result = types.void(raw, types.intp, out, types.intp)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            raw, at, out, to = arguments
            source = _pointer(context, builder, signature.args[0], raw, at)
            halves = _load(builder, source, ir.VectorType(ir.IntType(16), _EIGHT), 1)
            target = _pointer(context, builder, signature.args[2], out, to)
            _store(builder, convert(builder, halves), target, 4)
            return context.get_dummy_value()

        return result, generate

    return intrinsic(define)


# ``out[to + i]`` = the number at byte ``at + 2 * i`` of `raw`, for eight of them, NaNs bit for bit.
widen_bf16 = _widen(_bfloat)
widen_f16 = _widen(_exact_half)


@intrinsic
def interleave(_context: Any, x: Any, at: Any, step: Any, tokens: Any, out: Any, to: Any) -> Any:
    """``out[to + c * tokens + t] = x[at + t * step + c]`` for `tokens` t, at most eight, and eight columns c.

    The ``8 - tokens`` elements of `out` after those are overwritten.
    """
    size = types.intp
    result = types.void(x, size, size, size, out, size)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, at, step, tokens, out, to = arguments
        source = _pointer(context, builder, signature.args[0], x, at)
        last = builder.sub(tokens, tokens.type(1))
        rows = []
        for t in range(_EIGHT):
            row = tokens.type(t)
            row = builder.select(builder.icmp_signed("<", row, last), row, last)
            rows.append(_load(builder, builder.gep(source, [builder.mul(step, row)]), _FLOATS, 4))
        target = _pointer(context, builder, signature.args[4], out, to)
        for c, column in enumerate(_transposed_floats(builder, rows)):
            _store(builder, column, builder.gep(target, [builder.mul(tokens, tokens.type(c))]), 4)
        return context.get_dummy_value()

    return result, generate


# ``panel[to + c * LANES + r]`` = the number at byte ``at + r * step + c * size`` of `raw`, for eight rows r
# and eight columns c.
spread_f32 = _spread_floats("F32")
spread_bf16 = _spread_floats("BF16")
spread_f16 = _spread_floats("F16")

# ``sums[r] += x[k] * w[r, k]`` for k = 0 .. 8 * eights - 1, in this order, where row r of LANES begins
# at byte ``at + r * step`` of `raw`.
multiply_f32 = _multiply_stored("F32")
multiply_bf16 = _multiply_stored("BF16")
multiply_f16 = _multiply_stored("F16")


def _loop(builder: Any, count: Any, initial: list[Any], step: Any, unroll: int = 2) -> list[Any]:
    """``for k in range(count): values = step(k, values)`` with the values in registers.

    `count` is a positive multiple of `unroll`.
    """
    before = builder.block
    body, done = builder.append_basic_block("body"), builder.append_basic_block("done")
    builder.branch(body)
    builder.position_at_end(body)
    k = builder.phi(count.type)
    phis = [builder.phi(value.type) for value in initial]
    values: list[Any] = list(phis)
    for i in range(unroll):
        values = step(builder.add(k, count.type(i)) if i else k, values)
    following = builder.add(k, count.type(unroll))
    for phi, first, later in zip([k, *phis], [count.type(0), *initial], [following, *values], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, count), body, done)
    builder.position_at_end(done)
    return values


def _scale_16(how: str) -> Any:
    def define(_context: Any, quants: Any, at: Any, scale: Any, shift: Any, out: Any, to: Any) -> Any:
        result = types.void(quants, types.intp, types.float32, types.float32, out, types.intp)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            quants, at, scale, shift, out, to = arguments
            source = _pointer(context, builder, signature.args[0], quants, at)
            packed = _load(builder, source, ir.VectorType(_I8, 16), 1)
            floats = builder.sitofp(packed, ir.VectorType(_FLOAT, 16))
            values, shifts = builder.fmul(_splat(builder, scale, 16), floats), _splat(builder, shift, 16)
            if how == "subtract":
                values = builder.fsub(values, shifts)
            if how == "add":
                # Where both are NaN, ggml keeps the first; LLVM may swap the operands of a sum.
                ordered = builder.fcmp_ordered("ord", values, values)
                values = builder.select(ordered, builder.fadd(values, shifts), values)
            _store(builder, values, _pointer(context, builder, signature.args[4], out, to), 4)
            return context.get_dummy_value()

        return result, generate

    return intrinsic(define)


# ``out[to + i] = scale * quants[at + i]``, then minus or plus `shift`, for 16 int8 quants.
scale_16 = _scale_16("none")
scale_16_subtract = _scale_16("subtract")
scale_16_add = _scale_16("add")
