"""Products of f32 activations with rows of weights that are decoded a panel at a time.

A panel holds LANES rows side by side and DEPTH columns: stored rows are decoded straight into it, then
every token passes over it. So each weight is decoded once and read from the first-level cache, and one
token costs no padding. The chain of an output is column 0 first, whatever the widths are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.kernels import float_vectors as vectors
from driftscope.kernels.float_vectors import DEPTH, LANES, WIDTH
from driftscope.kernels.jit import device, kernel

# How `multiply_floats` is told the format.
FLOAT_KINDS = {"F32": 0, "BF16": 1, "F16": 2}

_STEP = 8
_ROW_BLOCK = 16
# Tiles of tokens that pass over all panels of a block of rows before the next ones do: 120 KiB of x.
_CHUNK = 20


def block_rows(n: int) -> int:
    """Rows that are decoded before `n` tokens pass over them: many if there are many to pass."""
    return WIDTH if n < 64 else 4 * WIDTH


def pack_tokens(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """``f32[parts, n * DEPTH]``: the columns of `x` in parts, the last one padded with zeros.

    A part holds the tiles of tokens one after the other, each ``f32[DEPTH, tokens of the tile]``.
    """
    n, k = x.shape
    parts = -(-k // DEPTH)
    # `interleave` writes a little beyond a tile, the next one over that.
    packed = np.empty(parts * n * DEPTH + _STEP, np.float32)
    _pack(np.ascontiguousarray(x, np.float32), packed)
    return packed[: parts * n * DEPTH].reshape(parts, n * DEPTH)


@device
def _tiles(n: int) -> int:
    """Tiles of at most six tokens: twelve sums of eight lanes leave room in the registers of AVX2."""
    return (n + 5) // 6


@device
def _first(n: int, tile: int) -> int:
    """First token of a tile; tiles are as even as they come."""
    return n * tile // _tiles(n)


@kernel("void(R(f4, 2), f4[::1])")
def _pack(x: Any, packed: Any) -> None:
    n, k = x.shape
    for part in range((k + DEPTH - 1) // DEPTH):
        start = part * DEPTH
        count = min(DEPTH, k - start)
        whole = count // _STEP * _STEP
        for tile in range(_tiles(n)):
            first = _first(n, tile)
            tokens = _first(n, tile + 1) - first
            at, to = first * k + start, (part * n + first) * DEPTH
            for c in range(0, whole, _STEP):
                vectors.interleave(x, at + c, k, tokens, packed, to + c * tokens)
            for c in range(whole, count):
                for t in range(tokens):
                    packed[to + c * tokens + t] = x[first + t, start + c]
            packed[to + count * tokens : to + DEPTH * tokens] = 0


@device
def _multiply(panels: Any, used: int, x: Any, part: int, n: int, sums: Any, count: int) -> None:
    """Every token over the panels, a chunk of tokens at a time: it stays in the second-level cache."""
    if n == 1:
        vectors.multiply_1x2(panels, x[part], 0, sums, 0, count)
        return
    if n == 2:
        vectors.multiply_2x2(panels, x[part], 0, sums, 0, count)
        return
    tiles = _tiles(n)
    for chunk in range(0, tiles, _CHUNK):
        for p in range(used):
            for tile in range(chunk, min(tiles, chunk + _CHUNK)):
                first = _first(n, tile)
                tokens = _first(n, tile + 1) - first
                at, to = first * DEPTH, (p * n + first) * LANES
                if tokens == 6:
                    vectors.multiply_6x1(panels[p], x[part], at, sums, to, count)
                elif tokens == 5:
                    vectors.multiply_5x1(panels[p], x[part], at, sums, to, count)
                elif tokens == 4:
                    vectors.multiply_4x1(panels[p], x[part], at, sums, to, count)
                else:
                    vectors.multiply_3x1(panels[p], x[part], at, sums, to, count)


@device
def _store(sums: Any, n_rows: int, out: Any, to: int) -> None:
    for t in range(out.shape[0]):
        for r in range(0, n_rows, LANES):
            lanes = sums[r // LANES, t]
            row = out[t, to + r : to + n_rows]
            for lane in range(min(LANES, n_rows - r)):
                row[lane] = lanes[lane]


@device
def _scales_of(scales: Any, d: Any, row: int, first: int, count: int, per_block: int, out: Any) -> None:
    """``out[s, r] = d * scale`` of sub-blocks `first` .. of WIDTH rows."""
    step, d_step = scales.shape[1], d.shape[1]
    whole = count // _STEP * _STEP if per_block == 1 or per_block >= _STEP else 0
    for eight in range(0, WIDTH, _STEP):
        r = row + eight
        for s in range(0, whole, _STEP):
            at, block, to = r * step + first + s, r * d_step + (first + s) // per_block, s * WIDTH + eight
            if per_block == 1:
                vectors.spread_scales_each(scales, at, step, d, block, d_step, out, to)
            else:
                vectors.spread_scales(scales, at, step, d, block, d_step, out, to)
        for s in range(whole, count):
            for i in range(_STEP):
                out[s, eight + i] = d[r + i, (first + s) // per_block] * np.float32(scales[r + i, first + s])


@kernel(
    "void(f4[:,::1], int64, int8[:,::1], int8[:,::1], int8[:,::1], f4[:,::1], f4[:,::1],"
    " int64, int64, int64, int64, int64, f4[:,::1], int64)"
)
def multiply_unpacked(
    x: Any,
    n: int,
    quants: Any,
    scales: Any,
    mins: Any,
    d: Any,
    dmin: Any,
    sub_block: int,
    block: int,
    offset: int,
    rows_a_block: int,
    n_rows: int,
    out: Any,
    to: int,
) -> None:
    """Columns ``to .. to + n_rows`` of `out` from unpacked rows (`driftscope.kernels.unpack`).

    `x` is `pack_tokens` of `n` rows of activations, and `rows_a_block` `block_rows` of `n`. The arrays of
    rows have room for a multiple of WIDTH rows; `offset` is 0, 1 or 2: nothing, minus, plus the minimum.
    """
    k = quants.shape[1]
    per_block = block // sub_block
    sums = np.empty((rows_a_block // LANES, n, LANES), np.float32)
    panels = np.empty((rows_a_block // LANES, DEPTH, LANES), np.float32)
    scale = np.empty((DEPTH // _ROW_BLOCK, WIDTH), np.float32)
    shift = np.zeros((DEPTH // _ROW_BLOCK, WIDTH), np.float32)
    for first in range(0, n_rows, rows_a_block):
        end = min(n_rows, first + rows_a_block)
        sums[:] = 0
        for part in range(x.shape[0]):
            start = part * DEPTH
            count = min(DEPTH, k - start)
            subs = count // sub_block
            for row in range(first, end, WIDTH):
                _scales_of(scales, d, row, start // sub_block, subs, per_block, scale)
                if offset:
                    _scales_of(mins, dmin, row, start // sub_block, subs, per_block, shift)
                for eight in range(0, WIDTH, _STEP):
                    lane = _place(row - first + eight)
                    for c in range(0, count, _ROW_BLOCK):
                        at, to_lane = (row + eight) * k + start + c, lane + c * LANES
                        s = c // sub_block * WIDTH + eight
                        if offset == 0:
                            vectors.spread_quants(quants, at, k, scale, shift, s, panels, to_lane)
                        elif offset == 1:
                            vectors.spread_quants_subtract(quants, at, k, scale, shift, s, panels, to_lane)
                        else:
                            vectors.spread_quants_add(quants, at, k, scale, shift, s, panels, to_lane)
            _multiply(panels, (end - first + LANES - 1) // LANES, x, part, n, sums, count)
        _store(sums, end - first, out, to + first)


@device
def _place(row: int) -> int:
    """Where in the panels the first column of a row is."""
    return row // LANES * DEPTH * LANES + row % LANES


@device
def _spread_floats(
    raw: Any, at: int, step: int, kind: int, size: int, count: int, panel: Any, row: int
) -> None:
    """WIDTH rows that are `step` bytes apart, from byte `at`, to the panels from row `row` on."""
    for eight in range(0, WIDTH, _STEP):
        lane = _place(row + eight)
        for c in range(0, count, _STEP):
            source, to = at + eight * step + c * size, lane + c * LANES
            if kind == 0:
                vectors.spread_f32(raw, source, step, panel, to)
            elif kind == 1:
                vectors.spread_bf16(raw, source, step, panel, to)
            else:
                vectors.spread_f16(raw, source, step, panel, to)


@device
def _multiply_one(x: Any, raw: Any, kind: int, first: int, end: int, out: Any) -> int:
    """One token straight from the stored rows, LANES at a time; the row after the last one that is done.

    Nothing is done where rows are not a multiple of eight columns.
    """
    step = raw.shape[1]
    columns = step // (2 if kind else 4)
    eights = 0 if columns % _STEP else columns // _STEP
    sums = np.empty(LANES, np.float32)
    row = first
    while row + LANES <= end and eights:
        at = row * step
        for lane in range(LANES):
            sums[lane] = 0.0
        if kind == 0:
            vectors.multiply_f32(raw, at, step, x, sums, eights)
        elif kind == 1:
            vectors.multiply_bf16(raw, at, step, x, sums, eights)
        else:
            vectors.multiply_f16(raw, at, step, x, sums, eights)
        out[0, row : row + LANES] = sums
        row += LANES
    return row


@kernel("void(f4[:,::1], int64, R(uint8, 2), int64, int64, int64, int64, f4[:,::1])")
def multiply_floats(
    x: Any, n: int, raw: Any, kind: int, rows_a_block: int, first: int, end: int, out: Any
) -> None:
    """Columns ``first .. end`` of `out` from these rows of stored f32, bf16 or f16 (`kind` 0, 1, 2).

    `x` is `pack_tokens` of `n` rows of activations, `rows_a_block` `block_rows` of `n`, `raw`
    uint8[rows, columns * 4 or 2].
    """
    step = raw.shape[1]
    size = 2 if kind else 4
    k = step // size
    sums = np.empty((rows_a_block // LANES, n, LANES), np.float32)
    panels = np.empty((rows_a_block // LANES, DEPTH, LANES), np.float32)
    # Fewer than WIDTH rows or a number of columns that is not a multiple of eight are filled up with zeros.
    padded = np.zeros((WIDTH, DEPTH * size), np.uint8)
    if n == 1:
        first = _multiply_one(x.reshape(-1), raw, kind, first, end, out)
    for block in range(first, end, rows_a_block):
        block_end = min(end, block + rows_a_block)
        sums[:] = 0
        for part in range(x.shape[0]):
            start = part * DEPTH
            count = min(DEPTH, k - start)
            for row in range(block, block_end, WIDTH):
                n_rows = min(WIDTH, block_end - row)
                if n_rows == WIDTH and count % _STEP == 0:
                    at = row * step + start * size
                    _spread_floats(raw, at, step, kind, size, count, panels, row - block)
                    continue
                for r in range(n_rows):
                    padded[r, : count * size] = raw[row + r, start * size : (start + count) * size]
                for r in range(WIDTH):
                    padded[r, count * size :] = 0
                _spread_floats(padded, 0, DEPTH * size, kind, size, count, panels, row - block)
            used = (block_end - block + LANES - 1) // LANES
            _multiply(panels, used, x, part, n, sums, count + (count & 1))
        _store(sums, block_end - block, out, block)
