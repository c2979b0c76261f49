"""Tiles of f32 matrix products: LANES tokens side by side against groups of ROWS rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.kernels.jit import device, kernel
from driftscope.kernels.vectors import LANES, ROWS, accumulate_f32

# Columns of the factors that are worked on at a time: a panel of 512 x 16 f32 is 32 KiB, the first-level
# cache. Partial sums are stored between parts, so this does not change the order of accumulation.
_DEPTH = 512


def pack_f32(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """``f32[tiles, k, LANES]``: LANES tokens side by side, the last tile padded with zeros."""
    n, k = x.shape
    tiles = -(-n // LANES)
    padded = np.zeros((tiles * LANES, k), np.float32)
    padded[:n] = x
    return np.ascontiguousarray(padded.reshape(tiles, LANES, k).transpose(0, 2, 1))


@device
def scatter(sums: Any, n_rows: int, out: Any, to: int) -> None:
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
def multiply_panels(panels: Any, w: Any, out: Any, to: int) -> None:
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
    scatter(sums, n_rows, out, to)
