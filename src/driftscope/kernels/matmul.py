"""Matrix products with a fixed order of accumulation.

``matmul_f32`` is path A: f32 products summed one after the other in f32, first column first. No fused
multiply-add, no reordering: the chain of an output is the same whatever the other rows, the number of
threads and the width of the vectors, because vectors run across tokens and never along a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.errors import InputError
from driftscope.kernels.activations import QuantizedActivation, RoundedActivation, quantize_activation
from driftscope.kernels.dequantize import dequantize, expand, plain_values, slab_rows
from driftscope.kernels.formats import BlockFormat, format_of, row_columns
from driftscope.kernels.jit import device, kernel
from driftscope.kernels.parallel import over_rows
from driftscope.kernels.unpack import UnpackedRows, check_raw
from driftscope.kernels.vectors import (
    LANES,
    ROWS,
    accumulate_blocks,
    accumulate_blocks_with_minimum,
    accumulate_f32,
    fold_16,
)

# Columns of the factors that are worked on at a time: a panel of 512 x 16 f32 is 32 KiB, the first-level
# cache. Partial sums are stored between parts, so this does not change the order of accumulation.
_DEPTH = 512
_INTEGER_DEPTH = 1024


def matmul_f32(x: NDArray[np.float32], w: NDArray[np.float32], *, threads: int = 1) -> NDArray[np.float32]:
    """``out[t, r] = sum over k of w[r, k] * x[t, k]``, in f32, k = 0 first, each operation rounded.

    Args:
        x: ``float32[n, k]``, one row a token.
        w: ``float32[r, k]``, one row an output.
        threads: number of threads; the result does not depend on it.

    Returns:
        ``float32[n, r]``. A row of the result depends on its row of `x` alone. Infinities and NaNs follow
        IEEE; the payload of a NaN is not specified.
    """
    w = np.ascontiguousarray(w, np.float32)
    return _in_slabs(x, w.shape, threads, lambda: lambda first, end: w[first:end])


def matmul_f32_quantized(
    x: NDArray[np.float32], raw: NDArray[np.uint8], dtype: str, *, threads: int = 1
) -> NDArray[np.float32]:
    """`matmul_f32` with stored rows of any format, dequantized a few at a time.

    Args:
        x: ``float32[n, k]``.
        raw: ``uint8[r, row_bytes]``, the stored rows.
        dtype: format name, see `driftscope.kernels.formats`.
        threads: number of threads; the result does not depend on it.

    Returns:
        ``float32[n, r]``, bit for bit ``matmul_f32(x, dequantize(raw, dtype))``.

    Raises:
        InputError: unknown format, or a row that does not have k values.
    """
    layout = format_of(dtype)
    shape = (raw.shape[0], row_columns(dtype, raw.shape[1]))
    if layout.is_integer:
        raw, n_columns = check_raw(raw, dtype)
        slab = min(slab_rows(n_columns), max(1, shape[0]))

        def reader() -> Callable[[int, int], NDArray[np.float32]]:
            unpacked = UnpackedRows.empty(layout, slab, n_columns)
            values = np.empty((slab, n_columns), np.float32)

            def read(first: int, end: int) -> NDArray[np.float32]:
                unpacked.fill(raw, first, end)
                expand(unpacked, values[: end - first])
                return values[: end - first]

            return read

        return _in_slabs(x, shape, threads, reader)
    if layout.native:
        return _in_slabs(x, shape, threads, lambda: lambda first, end: plain_values(raw[first:end], dtype))
    return _in_slabs(x, shape, threads, lambda: lambda first, end: dequantize(raw[first:end], dtype))


Reader = Callable[[int, int], NDArray[np.float32]]


def _in_slabs(
    x: NDArray[np.float32], shape: tuple[int, ...], threads: int, reader: Callable[[], Reader]
) -> NDArray[np.float32]:
    """Multiply `x` with rows that ``reader()`` gives as ``f32[end - first, k]``; one reader a range."""
    n_rows, n_columns = shape
    check_factor(x, n_columns)
    out = np.empty((x.shape[0], n_rows), np.float32)
    panels = _pack_f32(x)
    slab = slab_rows(n_columns)

    def work(first: int, end: int) -> None:
        read = reader()
        for start in range(first, end, slab):
            _multiply_panels(panels, read(start, min(end, start + slab)), out, start)

    over_rows(work, n_rows, threads=threads, grain=slab)
    return out


def check_factor(x: NDArray[np.float32], n_columns: int) -> None:
    """Refuse an `x` that cannot be multiplied with rows of `n_columns` values."""
    if x.ndim != 2 or x.shape[1] != n_columns:
        raise InputError(f"cannot multiply x of shape {list(x.shape)} with rows of {n_columns} values")


def _pack_f32(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """``f32[tiles, k, LANES]``: LANES tokens side by side, the last tile padded with zeros."""
    n, k = x.shape
    tiles = -(-n // LANES)
    padded = np.zeros((tiles * LANES, k), np.float32)
    padded[:n] = x
    return np.ascontiguousarray(padded.reshape(tiles, LANES, k).transpose(0, 2, 1))


@device
def _scatter(sums: Any, n_rows: int, out: Any, to: int) -> None:
    """Tiles of sums ``[tiles, groups, ROWS, LANES]`` to columns ``to..to + n_rows`` of `out`."""
    n = out.shape[0]
    for tile in range(sums.shape[0]):
        for lane in range(min(LANES, n - tile * LANES)):
            row = out[tile * LANES + lane, to : to + n_rows]
            column = sums[tile, :, :, lane]
            for group in range(n_rows // ROWS):
                for i in range(ROWS):
                    row[group * ROWS + i] = column[group, i]
            for r in range(n_rows // ROWS * ROWS, n_rows):
                row[r] = column[r // ROWS, r % ROWS]


@kernel("void(R(f4, 3), R(f4, 2), f4[:, ::1], int64)")
def _multiply_panels(panels: Any, w: Any, out: Any, to: int) -> None:
    """Columns ``to..`` of `out` from the rows of `w`.

    Parts of the depth, then tiles of tokens, then groups of ROWS rows: a panel stays in the first-level
    cache while the rows of `w` pass from the second.
    """
    n_rows, k = w.shape
    tiles = panels.shape[0]
    groups = (n_rows + ROWS - 1) // ROWS
    sums = np.zeros((tiles, groups, ROWS, LANES), np.float32)
    parts = (k + _DEPTH - 1) // _DEPTH
    last = n_rows - 1
    for part in range(parts):
        start = k * part // parts
        count = k * (part + 1) // parts - start
        for tile in range(tiles):
            for group in range(groups):
                # A group beyond the last row repeats it; the repeated sums are not read.
                r = group * ROWS
                accumulate_f32(
                    panels,
                    (tile * k + start) * LANES,
                    w,
                    r * k + start,
                    min(r + 1, last) * k + start,
                    min(r + 2, last) * k + start,
                    min(r + 3, last) * k + start,
                    sums,
                    (tile * groups + group) * ROWS * LANES,
                    count,
                )
    _scatter(sums, n_rows, out, to)


def matmul_quantized(
    x: NDArray[np.float32],
    raw: NDArray[np.uint8],
    dtype: str,
    *,
    activation: str | None = None,
    threads: int = 1,
) -> NDArray[np.float32]:
    """Path B: quantize the activation, multiply in integers, scale.

    For each block ``b``, the smaller of the weight's and the activation's, in order, in f32:
    ``total += (d_w * d_x) * f32(sum of scale * q_w * q_x) - (dmin_w * d_x) * f32(sum of min * sum of q_x)``;
    the sums in integers, exact. Q4_1 and Q5_1 with q8_1 use its f16 ``s`` as ggml does: ``... + m * s``.

    Args:
        x: ``float32[n, k]``.
        raw: ``uint8[r, row_bytes]``, the stored rows.
        dtype: format of the rows.
        activation: activation format; None for the one that ggml multiplies `dtype` with. With a float
            format (``none``, ``f16``, ``bf16``) the rows are dequantized and multiplied by `matmul_f32`.
        threads: number of threads; the result does not depend on it.

    Returns:
        ``float32[n, r]``. A row of the result depends on its row of `x` alone.

    Raises:
        InputError: unknown format, sizes that do not fit, or a format without an integer dot product.
    """
    layout = format_of(dtype)
    n_columns = row_columns(dtype, raw.shape[1])
    check_factor(x, n_columns)
    if activation is None and not layout.native:
        raise InputError(f"there is no integer dot product for {dtype}: choose a float activation format")
    quantized = quantize_activation(x, layout.activation if activation is None else activation)
    if isinstance(quantized, RoundedActivation):
        return matmul_f32_quantized(quantized.values, raw, dtype, threads=threads)
    if not layout.is_integer:
        raise InputError(f"there is no integer dot product of {dtype} weights with {quantized.format}")
    raw, _ = check_raw(raw, dtype)
    shared = _Blocks.of(layout, quantized)
    panels = _IntegerPanels.of(quantized, layout, shared)
    out = np.empty((x.shape[0], raw.shape[0]), np.float32)
    slab = slab_rows(n_columns)

    def work(first: int, end: int) -> None:
        rows = _IntegerRows.empty(layout, shared, min(slab, end - first), n_columns)
        for start in range(first, end, slab):
            stop = min(end, start + slab)
            rows.fill(raw, start, stop)
            _multiply_integer_panels(
                *(panels.quants, panels.extras, panels.d, panels.s),
                *(rows.quants, rows.extras, rows.d, rows.dmin),
                *(layout.offset != "none", stop - start, out, start),
            )

    over_rows(work, raw.shape[0], threads=threads, grain=slab)
    return out


@dataclass(frozen=True)
class _Blocks:
    """What the two factors of an integer product share.

    Attributes:
        size: values in a block, the smaller of the two formats'.
        sub_block: values that share an integer minimum.
        extras: integers a block beside the quants, for the minima: one a sub-block, at least two.
        f16_sum: whether the minima multiply q8_1's ``s`` and not sums of the quants.
    """

    size: int
    sub_block: int
    extras: int
    f16_sum: bool

    @classmethod
    def of(cls, layout: BlockFormat, activation: QuantizedActivation) -> _Blocks:
        size = min(layout.block_size, activation.block_size)
        f16_sum = layout.offset == "add" and activation.s is not None
        return cls(size, layout.sub_block, max(2, size // layout.sub_block), f16_sum)


@dataclass(frozen=True)
class _IntegerPanels:
    """An activation, LANES tokens side by side and pairs of columns adjacent, padded with zeros."""

    quants: NDArray[np.int16]
    extras: NDArray[np.int16]
    d: NDArray[np.float32]
    s: NDArray[np.float32]

    @classmethod
    def of(cls, activation: QuantizedActivation, layout: BlockFormat, shared: _Blocks) -> _IntegerPanels:
        n, k = activation.quants.shape
        tiles, blocks = -(-n // LANES), k // shared.size
        repeat = activation.block_size // shared.size
        quants = np.zeros((tiles, blocks, shared.size // 2, LANES, 2), np.int16)
        extras = np.zeros((tiles, blocks, shared.extras // 2, LANES, 2), np.int16)
        d = np.zeros((tiles, blocks, LANES), np.float32)
        s = d
        _pack_integers(activation.quants, activation.d, repeat, shared.sub_block, quants, extras, d)
        if shared.f16_sum:
            assert activation.s is not None
            extras[:, :, 0, :, 0] = 1
            padded = np.zeros((tiles * LANES, blocks), np.float32)
            padded[:n] = activation.s
            s = np.ascontiguousarray(padded.reshape(tiles, LANES, blocks).transpose(0, 2, 1))
        return cls(quants, extras, d, s)


@dataclass(frozen=True)
class _IntegerRows:
    """Rows of a weight with the integer scales multiplied into the quants, which int16 holds exactly."""

    shared: _Blocks
    unpacked: UnpackedRows
    quants: NDArray[np.int16]
    extras: NDArray[np.int16]
    d: NDArray[np.float32]
    dmin: NDArray[np.float32]

    @classmethod
    def empty(cls, layout: BlockFormat, shared: _Blocks, n_rows: int, n_columns: int) -> _IntegerRows:
        blocks = n_columns // shared.size
        return cls(
            shared,
            UnpackedRows.empty(layout, n_rows, n_columns),
            np.zeros((n_rows, n_columns), np.int16),
            np.zeros((n_rows, blocks, shared.extras), np.int16),
            np.zeros((n_rows, blocks), np.float32),
            np.zeros((n_rows, blocks), np.float32),
        )

    def fill(self, raw: NDArray[np.uint8], first: int, end: int) -> None:
        unpacked, layout = self.unpacked, self.unpacked.layout
        unpacked.fill(raw, first, end)
        _fold_rows(
            *(end - first, layout.sub_block, layout.block_size // self.shared.size, layout.offset == "add"),
            *(unpacked.quants, unpacked.scales, unpacked.mins, unpacked.d, unpacked.dmin),
            *(self.quants, self.extras, self.d, self.dmin),
        )


@kernel("void(R(int8, 2), R(f4, 2), int64, int64, int16[:,:,:,:,::1], int16[:,:,:,:,::1], f4[:,:,::1])")
def _pack_integers(
    quants: Any, d: Any, repeat: int, sub_block: int, out: Any, extras: Any, out_d: Any
) -> None:
    """Quants, their sums over sub-blocks and their scales, as `_IntegerPanels` holds them."""
    half = out.shape[2]
    for t in range(quants.shape[0]):
        tile, lane = t // LANES, t % LANES
        for b in range(out.shape[1]):
            first = b * half * 2
            for pair in range(half):
                out[tile, b, pair, lane, 0] = quants[t, first + 2 * pair]
                out[tile, b, pair, lane, 1] = quants[t, first + 2 * pair + 1]
            for sub in range(2 * half // sub_block):
                total = 0
                for i in range(sub_block):
                    total += quants[t, first + sub * sub_block + i]
                extras[tile, b, sub // 2, lane, sub % 2] = total
            out_d[tile, b, lane] = d[t, b // repeat]


@kernel(
    "void(int64, int64, int64, boolean, int8[:,::1], int8[:,::1], int8[:,::1], f4[:,::1], f4[:,::1],"
    " int16[:,::1], int16[:,:,::1], f4[:,::1], f4[:,::1])"
)
def _fold_rows(
    n_rows: int,
    sub_block: int,
    repeat: int,
    negate: bool,
    quants: Any,
    scales: Any,
    mins: Any,
    d: Any,
    dmin: Any,
    out: Any,
    extras: Any,
    out_d: Any,
    out_dmin: Any,
) -> None:
    """Unpacked rows as `_IntegerRows` holds them; the minima of Q4_1 and Q5_1 are added, so negated here."""
    blocks = out_d.shape[1]
    subs = scales.shape[1] // blocks
    for r in range(n_rows):
        for s in range(scales.shape[1]):
            scale = np.int16(scales[r, s])
            for part in range(sub_block // 16):
                at = r * out.shape[1] + s * sub_block + part * 16
                fold_16(quants, at, scale, out, at)
            extras[r, s // subs, s % subs] = mins[r, s]
        for b in range(blocks):
            out_d[r, b] = d[r, b // repeat]
            out_dmin[r, b] = -dmin[r, b // repeat] if negate else dmin[r, b // repeat]


@kernel(
    "void(int16[:,:,:,:,::1], int16[:,:,:,:,::1], f4[:,:,::1], f4[:,:,::1],"
    " int16[:,::1], int16[:,:,::1], f4[:,::1], f4[:,::1], boolean, int64, f4[:, ::1], int64)"
)
def _multiply_integer_panels(
    panel: Any,
    panel_extra: Any,
    panel_d: Any,
    panel_s: Any,
    rows: Any,
    rows_extra: Any,
    rows_d: Any,
    rows_dmin: Any,
    with_minimum: bool,
    n_rows: int,
    out: Any,
    to: int,
) -> None:
    """Columns ``to..`` of `out`; the loops are those of `_multiply_panels`."""
    tiles, blocks, pairs = panel.shape[:3]
    extra_pairs = panel_extra.shape[2]
    groups = (n_rows + ROWS - 1) // ROWS
    sums = np.zeros((tiles, groups, ROWS, LANES), np.float32)
    parts = (blocks * pairs * 2 + _INTEGER_DEPTH - 1) // _INTEGER_DEPTH
    last = n_rows - 1
    for part in range(parts):
        block = blocks * part // parts
        count = blocks * (part + 1) // parts - block
        for tile in range(tiles):
            for group in range(groups):
                r = group * ROWS
                r1, r2, r3 = min(r + 1, last), min(r + 2, last), min(r + 3, last)
                at = (tile * groups + group) * ROWS * LANES
                # fmt: off
                if with_minimum:
                    accumulate_blocks_with_minimum(
                        panel, panel_extra, panel_d, panel_s, tile, rows, rows_extra, rows_d, rows_dmin,
                        r, r1, r2, r3, sums, at, block, count, pairs, extra_pairs, blocks,
                    )
                else:
                    accumulate_blocks(
                        panel, panel_extra, panel_d, panel_s, tile, rows, rows_extra, rows_d, rows_dmin,
                        r, r1, r2, r3, sums, at, block, count, pairs, extra_pairs, blocks,
                    )
                # fmt: on
    _scatter(sums, n_rows, out, to)
