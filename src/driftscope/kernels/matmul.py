"""Matrix products with a fixed order of accumulation.

``matmul_f32`` is path A: f32 products summed one after the other in f32, first column first. No fused
multiply-add, no reordering: the chain of an output is the same whatever the other rows, the number of
threads and the width of the vectors, because vectors run across tokens and never along a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.errors import InputError
from driftscope.kernels.dequantize import dequantize, expand, plain_values, slab_rows
from driftscope.kernels.formats import format_of, row_columns
from driftscope.kernels.jit import kernel
from driftscope.kernels.parallel import over_rows
from driftscope.kernels.unpack import UnpackedRows, check_raw
from driftscope.kernels.vectors import LANES, ROWS, accumulate_f32

# Columns of the factors that are worked on at a time: a panel of 512 x 16 f32 is 32 KiB, the first-level
# cache. Partial sums are stored between parts, so this does not change the order of accumulation.
_DEPTH = 512


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


@kernel("void(R(f4, 3), R(f4, 2), f4[:, ::1], int64)")
def _multiply_panels(panels: Any, w: Any, out: Any, to: int) -> None:
    """Columns ``to..`` of `out` from the rows of `w`.

    Parts of the depth, then tiles of tokens, then groups of ROWS rows: a panel stays in the first-level
    cache while the rows of `w` pass from the second.
    """
    n_rows, k = w.shape
    n = out.shape[0]
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
    for tile in range(tiles):
        for lane in range(min(LANES, n - tile * LANES)):
            row = out[tile * LANES + lane, to : to + n_rows]
            column = sums[tile, :, :, lane]
            for group in range(n_rows // ROWS):
                for i in range(ROWS):
                    row[group * ROWS + i] = column[group, i]
            for r in range(n_rows // ROWS * ROWS, n_rows):
                row[r] = column[r // ROWS, r % ROWS]
