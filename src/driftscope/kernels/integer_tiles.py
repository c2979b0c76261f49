"""Tiles of integer matrix products: 16 or 8 tokens side by side against groups of rows.

Quants are multiplied in bytes, an unsigned one of the weight with a signed one of the activation, and added
up over `Shared.steps` steps before the sub-block's integer scale is applied: all of it exact. A block then
costs one conversion to f32 and the operations that `driftscope.kernels.matmul` documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba.core import types
from numpy.typing import NDArray

from driftscope.kernels import instructions, ir
from driftscope.kernels.activations import QuantizedActivation
from driftscope.kernels.integer_rows import BIAS, MINIMA, NOTHING, SUMS, IntegerRows, Shared
from driftscope.kernels.ir import F32, I8, I16, I32, Builder, Value, vector
from driftscope.kernels.jit import device, intrinsic, kernel

# Columns that are worked on at a time: 16 tokens of 1024 bytes are half of a first-level cache.
_DEPTH = 1024


@dataclass(frozen=True)
class Panels:
    """Tokens of an activation, `lanes` side by side and four bytes (or two words) of a token adjacent.

    Attributes:
        first: the first token.
        quants: the bytes of ``int8[tiles, columns / 4, lanes, 4]``, or, where `Shared` says so, of
            ``int16[tiles, columns / 2, lanes, 2]``.
        extras: those of ``int16[tiles, blocks, pairs, lanes, 2]``, sums of quants over sub-blocks.
        d: ``float32[tiles, blocks, lanes]``.
        s: ``float32[tiles, blocks, lanes]``, q8_1's ``s``; `d` again where it is not needed.
    """

    first: int
    quants: NDArray[np.int8]
    extras: NDArray[np.int16]
    d: NDArray[np.float32]
    s: NDArray[np.float32]

    @property
    def lanes(self) -> int:
        """Tokens in a tile."""
        return self.d.shape[2]


def pack(activation: QuantizedActivation, shared: Shared) -> list[Panels]:
    """All tokens: tiles of 16, and one of 8 for a rest that it holds."""
    n = activation.quants.shape[0]
    wide = (n + 7) // 16 * 16
    parts = [_pack(activation, shared, 0, min(wide, n), 16)] if wide else []
    return parts if wide >= n else [*parts, _pack(activation, shared, wide, n, 8)]


def _pack(activation: QuantizedActivation, shared: Shared, first: int, end: int, lanes: int) -> Panels:
    k = activation.quants.shape[1]
    tiles, blocks = -(-(end - first) // lanes), k // shared.size
    repeat = activation.block_size // shared.size
    extras = np.zeros((tiles, blocks, shared.pairs, lanes, 2), np.int16)
    d = np.zeros((tiles, blocks, lanes), np.float32)
    quants = activation.quants[first:end]
    if shared.steps:
        packed = np.zeros((tiles, k // 4, lanes, 4), np.int8)
        _pack_bytes(quants.view(np.int32), packed.view(np.int32).reshape(tiles, k // 4, lanes))
    else:
        packed = np.zeros((tiles, k // 2, lanes, 2), np.int16)
        _pack_words(quants, packed)
    _pack_scales(activation.d[first:end], repeat, d)
    s = d
    if shared.offset == SUMS:
        assert activation.s is not None
        s = np.zeros_like(d)
        _pack_scales(activation.s[first:end], 1, s)
    elif shared.offset != NOTHING:
        _pack_sums(quants, shared.sub_block, extras)
    return Panels(first, packed.view(np.int8).reshape(-1), extras.reshape(-1), d, s)


@kernel("void(R(int32, 2), int32[:,:,::1])")
def _pack_bytes(quants: Any, out: Any) -> None:
    lanes = out.shape[2]
    for t in range(quants.shape[0]):
        column = out[t // lanes, :, t % lanes]
        for i in range(quants.shape[1]):
            column[i] = quants[t, i]


@kernel("void(R(int8, 2), int16[:,:,:,::1])")
def _pack_words(quants: Any, out: Any) -> None:
    lanes = out.shape[2]
    for t in range(quants.shape[0]):
        for i in range(out.shape[1]):
            out[t // lanes, i, t % lanes, 0] = quants[t, 2 * i]
            out[t // lanes, i, t % lanes, 1] = quants[t, 2 * i + 1]


@kernel("void(R(int8, 2), int64, int16[:,:,:,:,::1])")
def _pack_sums(quants: Any, sub_block: int, out: Any) -> None:
    lanes = out.shape[3]
    subs = quants.shape[1] // sub_block // out.shape[1]
    for t in range(quants.shape[0]):
        for b in range(out.shape[1]):
            for sub in range(subs):
                first = (b * subs + sub) * sub_block
                total = np.int16(0)
                for i in range(sub_block):
                    total += np.int16(quants[t, first + i])
                out[t // lanes, b, sub // 2, t % lanes, sub % 2] = total


@kernel("void(R(f4, 2), int64, f4[:,:,::1])")
def _pack_scales(d: Any, repeat: int, out: Any) -> None:
    lanes = out.shape[2]
    for t in range(d.shape[0]):
        for b in range(out.shape[1]):
            out[t // lanes, b, t % lanes] = d[t, b // repeat]


class Multiplier:
    """The tokens of some panels and the rows that a slab holds, ready to be multiplied."""

    def __init__(self, panels: Panels, rows: IntegerRows) -> None:
        """Rows may be filled anew between calls."""
        shared, (tiles, _, lanes) = rows.shared, panels.d.shape
        sums = np.empty((tiles, rows.d.shape[0], lanes), np.float32)
        self._kernel = _KERNELS[lanes, shared.steps]
        self._arguments = (
            *(panels.quants, panels.extras, panels.d, panels.s),
            *(rows.quants, rows.scales.reshape(-1), rows.extras.reshape(-1), rows.d, rows.dmin),
            *(shared.groups, shared.pairs, shared.offset, sums, panels.first),
        )

    def multiply(self, n_rows: int, out: NDArray[np.float32], to: int) -> None:
        """Columns ``to..to + n_rows`` of `out`, ``float32[tokens, ...]``, for the tokens of the panels."""
        self._kernel(*self._arguments, n_rows, out, to)


@device
def _scatter(sums: Any, first: int, n_rows: int, out: Any, to: int) -> None:
    """Tiles of sums ``[tiles, rows, lanes]`` to columns ``to..to + n_rows`` of `out`."""
    lanes = sums.shape[2]
    for tile in range(sums.shape[0]):
        for lane in range(min(lanes, out.shape[0] - first - tile * lanes)):
            row = out[first + tile * lanes + lane, to : to + n_rows]
            for r in range(n_rows):
                row[r] = sums[tile, r, lane]


def _multiply_tiles(lanes: int, steps: int) -> Any:
    """An intrinsic that multiplies all tiles with all rows; `steps` as in `Shared`."""
    names = (
        "panel",
        "panel_extra",
        "panel_d",
        "panel_s",
        "rows",
        "scales",
        "rows_extra",
        "rows_d",
        "rows_dmin",
    )

    def define(
        _context: Any,
        panel: Any,
        panel_extra: Any,
        panel_d: Any,
        panel_s: Any,
        rows: Any,
        scales: Any,
        rows_extra: Any,
        rows_d: Any,
        rows_dmin: Any,
        sums: Any,
        tiles: Any,
        n_rows: Any,
        room: Any,
        blocks: Any,
        groups: Any,
        pairs: Any,
        offset: Any,
    ) -> Any:
        arrays = (panel, panel_extra, panel_d, panel_s, rows, scales, rows_extra, rows_d, rows_dmin, sums)
        result = types.void(*arrays, *[types.intp] * 7)

        def generate(context: Any, builder: Builder, signature: Any, arguments: Any) -> Any:
            data = [
                context.make_array(kind)(context, builder, value).data
                for kind, value in zip(signature.args[:10], arguments[:10], strict=True)
            ]
            _Tiles(builder, lanes, steps, dict(zip(names, data, strict=False)), arguments[10:]).run(data[9])
            return context.get_dummy_value()

        return result, generate

    return intrinsic(define)


class _Tiles:
    """Writes the loops of `_multiply_tiles`."""

    def __init__(
        self, builder: Builder, lanes: int, steps: int, data: dict[str, Value], sizes: list[Value]
    ) -> None:
        self.builder, self.lanes, self.steps, self.data = builder, lanes, steps, data
        self.tiles, self.n_rows, self.room, self.blocks, self.groups, self.pairs, self.offset = sizes
        self.vnni = instructions.integer_dots() in (instructions.VNNI, instructions.VNNI_512)
        self.width = 16 if lanes == 16 and instructions.integer_dots() == instructions.VNNI_512 else 8
        self.vectors = lanes // self.width
        # Eight accumulators: enough to hide what an instruction takes, few enough for 16 registers.
        self.rows = 8 // self.vectors

    def times(self, *factors: Any) -> Value:
        """A product of sizes."""
        product = factors[0]
        for factor in factors[1:]:
            product = self.builder.mul(product, product.type(factor) if isinstance(factor, int) else factor)
        return product

    def at(self, name: str, index: Value) -> Value:
        """Pointer into an array."""
        return ir.offset(self.builder, self.data[name], index)

    def run(self, sums: Value) -> None:
        """All parts of the depth, all tiles, all groups of rows."""
        builder = self.builder
        block_bytes = self.times(self.groups, 4 * self.steps if self.steps else 16)
        one = self.blocks.type(1)
        depth = self.times(self.blocks, block_bytes)
        parts = builder.sdiv(builder.add(depth, one.type(_DEPTH - 1)), one.type(_DEPTH))
        row_groups = builder.sdiv(self.n_rows, one.type(self.rows))

        def edge(part: Value) -> Value:
            return builder.sdiv(self.times(self.blocks, part), parts)

        def over_parts(part: Value, _: list[Value]) -> list[Value]:
            first, end = edge(part), edge(builder.add(part, one))

            def over_tiles(tile: Value, _: list[Value]) -> list[Value]:
                def over_rows(group: Value, _: list[Value]) -> list[Value]:
                    row = self.times(group, self.rows)
                    place = self.times(builder.add(self.times(tile, self.room), row), self.lanes)
                    target = ir.offset(builder, sums, place)
                    self.tile(tile, row, first, builder.sub(end, first), target)
                    return []

                return ir.loop(builder, row_groups, [], over_rows)

            return ir.loop(builder, self.tiles, [], over_tiles)

        ir.loop(builder, parts, [], over_parts)

    def tile(self, tile: Value, row: Value, first: Value, count: Value, target: Value) -> None:
        """One tile over `count` blocks."""
        builder = self.builder
        floats = vector(F32, self.width)
        places = [ir.offset(builder, target, i * self.width) for i in range(self.rows * self.vectors)]

        def step(index: Value, before: list[Value]) -> list[Value]:
            block = builder.add(first, index)
            return [builder.fadd(a, b) for a, b in zip(before, self.block(tile, row, block), strict=True)]

        start = [ir.load(builder, place, floats) for place in places]
        for place, value in zip(places, ir.loop(builder, count, start, step), strict=True):
            ir.store(builder, value, place)

    def row_blocks(self, row: Value, block: Value) -> list[Value]:
        """Number of `block` in each of the tile's rows, counted through all rows."""
        builder = self.builder
        return [
            builder.add(self.times(builder.add(row, row.type(r)), self.blocks), block)
            for r in range(self.rows)
        ]

    def block(self, tile: Value, row: Value, block: Value) -> list[Value]:
        """What a block adds to the sums."""
        builder = self.builder
        column = builder.add(self.times(tile, self.blocks), block)
        numbers = self.row_blocks(row, block)
        dots = self.dots(column, numbers)
        if self.steps == 0:
            return self.scaled("rows_d", "panel_d", numbers, column, dots)
        before = [builder.append_basic_block(name) for name in ("bias", "minima", "sums", "taken")]
        switch = builder.switch(self.offset, before[0])
        switch.add_case(self.offset.type(MINIMA), before[1])
        switch.add_case(self.offset.type(SUMS), before[2])
        results = []
        for kind, start in zip((BIAS, MINIMA, SUMS), before, strict=False):
            builder.position_at_end(start)
            found = self.taken(kind, column, numbers, dots)
            results.append((builder.block, found))
            builder.branch(before[3])
        builder.position_at_end(before[3])
        phis = [builder.phi(vector(F32, self.width)) for _ in dots]
        for origin, found in results:
            for phi, value in zip(phis, found, strict=True):
                phi.add_incoming(value, origin)
        return phis

    def taken(self, kind: int, column: Value, numbers: list[Value], dots: list[Value]) -> list[Value]:
        """The block's terms with bias or minima taken off."""
        builder = self.builder
        if kind == BIAS:
            extra = self.extra(column, numbers)
            exact = [builder.sub(dot, bias) for dot, bias in zip(dots, extra, strict=True)]
            return self.scaled("rows_d", "panel_d", numbers, column, exact)
        terms = self.scaled("rows_d", "panel_d", numbers, column, dots)
        if kind == MINIMA:
            offsets = self.scaled("rows_dmin", "panel_d", numbers, column, self.extra(column, numbers))
        else:
            offsets = self.scaled("rows_dmin", "panel_s", numbers, column, None)
        return [builder.fsub(term, offset) for term, offset in zip(terms, offsets, strict=True)]

    def scaled(
        self, row_name: str, lane_name: str, numbers: list[Value], column: Value, integers: list[Value] | None
    ) -> list[Value]:
        """``(row * lane) * f32(integer)`` for every row and lane."""
        builder = self.builder
        floats = vector(F32, self.width)
        start = self.at(lane_name, self.times(column, self.lanes))
        lanes = [
            ir.load(builder, ir.offset(builder, start, v * self.width), floats) for v in range(self.vectors)
        ]
        values = []
        for number in numbers:
            scale = ir.splat(builder, ir.load(builder, self.at(row_name, number), F32), self.width)
            values += [builder.fmul(scale, lane) for lane in lanes]
        if integers is None:
            return values
        return [
            builder.fmul(value, builder.sitofp(integer, floats))
            for value, integer in zip(values, integers, strict=True)
        ]

    def words(self, pointers: list[Value], lanes: Value, before: list[Value]) -> list[Value]:
        """Two columns of i16 more."""
        builder = self.builder
        pairs = vector(I16, 2 * self.width)
        columns = [
            ir.load(builder, ir.offset(builder, lanes, v * self.width * 4), pairs)
            for v in range(self.vectors)
        ]
        after = []
        for r, pointer in enumerate(pointers):
            word = ir.load(builder, pointer, I32)
            factor = builder.bitcast(ir.splat(builder, word, self.width), pairs)
            for v, values in enumerate(columns):
                product = ir.multiply_pairs(builder, factor, values)
                after.append(builder.add(before[r * self.vectors + v], product))
        return after

    def extra(self, column: Value, numbers: list[Value]) -> list[Value]:
        """Integer dot products of the extras."""
        builder = self.builder
        lanes = builder.bitcast(
            self.at("panel_extra", self.times(column, self.pairs, 2 * self.lanes)), I8.as_pointer()
        )
        rows = [
            builder.bitcast(self.at("rows_extra", self.times(number, self.pairs, 2)), I8.as_pointer())
            for number in numbers
        ]

        def step(pair: Value, before: list[Value]) -> list[Value]:
            here = [ir.offset(builder, row, self.times(pair, 4)) for row in rows]
            return self.words(here, ir.offset(builder, lanes, self.times(pair, 4 * self.lanes)), before)

        zeros = [ir.zeros(vector(I32, self.width))] * (self.rows * self.vectors)
        return ir.loop(builder, self.pairs, zeros, step)

    def dots(self, column: Value, numbers: list[Value]) -> list[Value]:
        """Integer dot products of a block, scales included."""
        builder = self.builder
        group_bytes = 4 * self.steps if self.steps else 16
        block_bytes = self.times(self.groups, group_bytes)
        lanes = self.at("panel", self.times(column, block_bytes, self.lanes))
        rows = [self.at("rows", self.times(number, block_bytes)) for number in numbers]
        scales = (
            [self.at("scales", self.times(number, self.groups)) for number in numbers] if self.steps else []
        )

        def step(group: Value, before: list[Value]) -> list[Value]:
            here = [ir.offset(builder, row, self.times(group, group_bytes)) for row in rows]
            lane = ir.offset(builder, lanes, self.times(group, group_bytes * self.lanes))
            if self.steps:
                found = self.group(here, lane, [ir.offset(builder, scale, group) for scale in scales])
                return [builder.add(a, b) for a, b in zip(before, found, strict=True)]
            for pair in range(4):
                pointers = [ir.offset(builder, row, 4 * pair) for row in here]
                before = self.words(pointers, ir.offset(builder, lane, 4 * pair * self.lanes), before)
            return before

        zeros = [ir.zeros(vector(I32, self.width))] * (self.rows * self.vectors)
        return ir.loop(builder, self.groups, zeros, step)

    def group(self, rows: list[Value], lanes: Value, scales: list[Value]) -> list[Value]:
        """`steps` steps of four columns, times their scales."""
        builder = self.builder
        quads, sums = vector(I8, 4 * self.width), vector(I32, self.width)
        totals: list[Value] = []
        for s in range(self.steps):
            columns = [
                ir.load(builder, ir.offset(builder, lanes, (s * self.lanes + v * self.width) * 4), quads)
                for v in range(self.vectors)
            ]
            found = []
            for r, row in enumerate(rows):
                word = ir.load(builder, ir.offset(builder, row, 4 * s), I32)
                factor = builder.bitcast(ir.splat(builder, word, self.width), quads)
                for v, values in enumerate(columns):
                    if self.vnni:
                        total = totals[r * self.vectors + v] if totals else ir.zeros(sums)
                        found.append(ir.add_dots(builder, total, factor, values))
                        continue
                    product = ir.multiply_bytes(builder, factor, values)
                    found.append(builder.add(totals[r * self.vectors + v], product) if totals else product)
            totals = found
        for r, scale in enumerate(scales):
            factor = ir.splat(builder, ir.load(builder, scale, I32), self.width)
            for i in range(r * self.vectors, (r + 1) * self.vectors):
                if self.vnni:
                    totals[i] = builder.mul(totals[i], factor)
                else:
                    pairs = builder.bitcast(factor, totals[i].type)
                    totals[i] = ir.multiply_pairs(builder, totals[i], pairs)
        return totals


_SIGNATURE = (
    "void(int8[::1], int16[::1], f4[:,:,::1], f4[:,:,::1], int8[::1], int32[::1], int16[::1], f4[:,::1],"
    " f4[:,::1], int64, int64, int64, f4[:,:,::1], int64, int64, f4[:,::1], int64)"
)
_tiles_16_8 = _multiply_tiles(16, 8)
_tiles_16_4 = _multiply_tiles(16, 4)
_tiles_16_2 = _multiply_tiles(16, 2)
_tiles_16_0 = _multiply_tiles(16, 0)
_tiles_8_8 = _multiply_tiles(8, 8)
_tiles_8_4 = _multiply_tiles(8, 4)
_tiles_8_2 = _multiply_tiles(8, 2)
_tiles_8_0 = _multiply_tiles(8, 0)


@kernel(_SIGNATURE)
def _multiply_16_8(
    panel: Any, extra: Any, d: Any, s: Any, rows: Any, scales: Any, rows_extra: Any, rows_d: Any,
    rows_dmin: Any, groups: int, pairs: int, offset: int,
    sums: Any, first: int, n_rows: int, out: Any, to: int,
) -> None:  # fmt: skip
    sums[:] = 0
    _tiles_16_8(
        panel, extra, d, s, rows, scales, rows_extra, rows_d, rows_dmin, sums,
        sums.shape[0], (n_rows + 7) // 8 * 8, sums.shape[1], d.shape[1], groups, pairs, offset,
    )  # fmt: skip
    _scatter(sums, first, n_rows, out, to)


@kernel(_SIGNATURE)
def _multiply_16_4(
    panel: Any, extra: Any, d: Any, s: Any, rows: Any, scales: Any, rows_extra: Any, rows_d: Any,
    rows_dmin: Any, groups: int, pairs: int, offset: int,
    sums: Any, first: int, n_rows: int, out: Any, to: int,
) -> None:  # fmt: skip
    sums[:] = 0
    _tiles_16_4(
        panel, extra, d, s, rows, scales, rows_extra, rows_d, rows_dmin, sums,
        sums.shape[0], (n_rows + 7) // 8 * 8, sums.shape[1], d.shape[1], groups, pairs, offset,
    )  # fmt: skip
    _scatter(sums, first, n_rows, out, to)


@kernel(_SIGNATURE)
def _multiply_16_2(
    panel: Any, extra: Any, d: Any, s: Any, rows: Any, scales: Any, rows_extra: Any, rows_d: Any,
    rows_dmin: Any, groups: int, pairs: int, offset: int,
    sums: Any, first: int, n_rows: int, out: Any, to: int,
) -> None:  # fmt: skip
    sums[:] = 0
    _tiles_16_2(
        panel, extra, d, s, rows, scales, rows_extra, rows_d, rows_dmin, sums,
        sums.shape[0], (n_rows + 7) // 8 * 8, sums.shape[1], d.shape[1], groups, pairs, offset,
    )  # fmt: skip
    _scatter(sums, first, n_rows, out, to)


@kernel(_SIGNATURE)
def _multiply_16_0(
    panel: Any, extra: Any, d: Any, s: Any, rows: Any, scales: Any, rows_extra: Any, rows_d: Any,
    rows_dmin: Any, groups: int, pairs: int, offset: int,
    sums: Any, first: int, n_rows: int, out: Any, to: int,
) -> None:  # fmt: skip
    sums[:] = 0
    _tiles_16_0(
        panel, extra, d, s, rows, scales, rows_extra, rows_d, rows_dmin, sums,
        sums.shape[0], (n_rows + 7) // 8 * 8, sums.shape[1], d.shape[1], groups, pairs, offset,
    )  # fmt: skip
    _scatter(sums, first, n_rows, out, to)


@kernel(_SIGNATURE)
def _multiply_8_8(
    panel: Any, extra: Any, d: Any, s: Any, rows: Any, scales: Any, rows_extra: Any, rows_d: Any,
    rows_dmin: Any, groups: int, pairs: int, offset: int,
    sums: Any, first: int, n_rows: int, out: Any, to: int,
) -> None:  # fmt: skip
    sums[:] = 0
    _tiles_8_8(
        panel, extra, d, s, rows, scales, rows_extra, rows_d, rows_dmin, sums,
        sums.shape[0], (n_rows + 7) // 8 * 8, sums.shape[1], d.shape[1], groups, pairs, offset,
    )  # fmt: skip
    _scatter(sums, first, n_rows, out, to)


@kernel(_SIGNATURE)
def _multiply_8_4(
    panel: Any, extra: Any, d: Any, s: Any, rows: Any, scales: Any, rows_extra: Any, rows_d: Any,
    rows_dmin: Any, groups: int, pairs: int, offset: int,
    sums: Any, first: int, n_rows: int, out: Any, to: int,
) -> None:  # fmt: skip
    sums[:] = 0
    _tiles_8_4(
        panel, extra, d, s, rows, scales, rows_extra, rows_d, rows_dmin, sums,
        sums.shape[0], (n_rows + 7) // 8 * 8, sums.shape[1], d.shape[1], groups, pairs, offset,
    )  # fmt: skip
    _scatter(sums, first, n_rows, out, to)


@kernel(_SIGNATURE)
def _multiply_8_2(
    panel: Any, extra: Any, d: Any, s: Any, rows: Any, scales: Any, rows_extra: Any, rows_d: Any,
    rows_dmin: Any, groups: int, pairs: int, offset: int,
    sums: Any, first: int, n_rows: int, out: Any, to: int,
) -> None:  # fmt: skip
    sums[:] = 0
    _tiles_8_2(
        panel, extra, d, s, rows, scales, rows_extra, rows_d, rows_dmin, sums,
        sums.shape[0], (n_rows + 7) // 8 * 8, sums.shape[1], d.shape[1], groups, pairs, offset,
    )  # fmt: skip
    _scatter(sums, first, n_rows, out, to)


@kernel(_SIGNATURE)
def _multiply_8_0(
    panel: Any, extra: Any, d: Any, s: Any, rows: Any, scales: Any, rows_extra: Any, rows_d: Any,
    rows_dmin: Any, groups: int, pairs: int, offset: int,
    sums: Any, first: int, n_rows: int, out: Any, to: int,
) -> None:  # fmt: skip
    sums[:] = 0
    _tiles_8_0(
        panel, extra, d, s, rows, scales, rows_extra, rows_d, rows_dmin, sums,
        sums.shape[0], (n_rows + 7) // 8 * 8, sums.shape[1], d.shape[1], groups, pairs, offset,
    )  # fmt: skip
    _scatter(sums, first, n_rows, out, to)


_KERNELS = {
    (16, 8): _multiply_16_8,
    (16, 4): _multiply_16_4,
    (16, 2): _multiply_16_2,
    (16, 0): _multiply_16_0,
    (8, 8): _multiply_8_8,
    (8, 4): _multiply_8_4,
    (8, 2): _multiply_8_2,
    (8, 0): _multiply_8_0,
}
