"""How the errors of a comparison lie over blocks and rows, from the same pass over the bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.kernels.compare import ROW_SUMS, CellFigures, Side, TensorComparison, compare_sides
from driftscope.kernels.compare_cells import (
    CELL,
    CodeScale,
    by_exponent,
    code_scale,
    float_step,
    least_exponent,
    scale_rounding,
)
from driftscope.kernels.dequantize import dequantize
from driftscope.kernels.expected_error import cell_energies
from driftscope.kernels.formats import BlockFormat, format_of, row_columns
from driftscope.kernels.jit import kernel
from driftscope.kernels.unpack import UnpackedRows

# Values that are decoded at a time where the pass itself cannot look at cells.
_PART = 1 << 20


@dataclass(frozen=True)
class BlockErrors:
    """Errors of b against a by cell of 32 values and by row, rows in canonical order.

    Attributes:
        n_rows: rows.
        columns: values of a row; the last cell of a row may have fewer than 32.
        scale: what a code stands for.
        energy: ``uint8[rows, cells]``: code of the mean squared error in twelfths of the squared step.
        peak: ``uint8[rows, cells]``: code of the largest squared error in squared steps.
        energy_counts: ``int64[256]``, cells with each code of `energy`.
        peak_counts: likewise of `peak`.
        by_row: ``float64[rows, 5]``: sums of a, b, a^2, b^2 and (a - b)^2 over the pairs that are finite.
    """

    n_rows: int
    columns: int
    scale: CodeScale
    energy: NDArray[np.uint8]
    peak: NDArray[np.uint8]
    energy_counts: NDArray[np.int64]
    peak_counts: NDArray[np.int64]
    by_row: NDArray[np.float64]


def compare_blocks(
    a_raw: NDArray[np.uint8],
    a_dtype: str,
    b_raw: NDArray[np.uint8],
    b_dtype: str,
    *,
    rows_a: NDArray[np.int64] | None = None,
    rows_b: NDArray[np.int64] | None = None,
    threads: int = 1,
) -> tuple[TensorComparison, BlockErrors]:
    """Compare tensor a with tensor b, cell by cell as well.

    Steps are those of b's format: of its stored scales, or of the exponent of each value for floats. A format
    that has no prediction counts as the f32 that it decodes to.

    Args:
        a_raw: see `driftscope.kernels.compare.compare`, as all others.
        a_dtype: format name of a.
        b_raw: the stored bytes of b.
        b_dtype: format name of b.
        rows_a: stored row of each canonical row of a.
        rows_b: likewise of b.
        threads: number of threads; the result does not depend on it.

    Returns:
        The very figures of `compare`, and those of cells and rows.

    Raises:
        InputError: as `compare`.
    """
    a, b = Side.of(a_raw, a_dtype, rows_a, False), Side.of(b_raw, b_dtype, rows_b, False)
    if a.direct and b.direct and a.columns % CELL == 0:
        figures = CellFigures.of(a.n_rows, a.columns)
        found, exact = compare_sides(a, b, into=figures, threads=threads)
        for first, end in exact:
            figures.by_row[first:end] = row_sums(_values(a, first, end), _values(b, first, end))
    else:
        found, _ = compare_sides(a, b, threads=threads)
        figures = _padded(a, b)
    shape = (2, a.n_rows, -(-a.columns // CELL))
    counts = np.zeros((2, 256), np.int64)
    for codes, into in zip(figures.codes, counts, strict=True):
        _count(codes, into)
    energy, peak = figures.codes.reshape(shape)
    return found, BlockErrors(
        a.n_rows, a.columns, code_scale(b.layout), energy, peak, counts[0], counts[1], figures.by_row
    )


def cell_ratios(
    a: NDArray[np.float32], b_raw: NDArray[np.uint8], b_dtype: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What the codes of some rows stand for, in float64.

    Args:
        a: ``float32[rows, columns]``.
        b_raw: ``uint8[rows, row_bytes]``.
        b_dtype: format name of b.

    Returns:
        Mean squared errors in twelfths of the squared step, and the largest squared errors in squared steps,
        ``float64[rows, cells]``: infinite or NaN where a value is not finite.
    """
    layout = format_of(b_dtype)
    missing = -a.shape[1] % CELL
    with np.errstate(all="ignore"):
        b = dequantize(b_raw, b_dtype)
        d = a.astype(np.float64) - b
        if by_exponent(layout):
            _, exponents = np.frexp(b)
            # frexp has its mantissa in [0.5, 1).
            least = least_exponent(layout) - 127
            d = d / np.ldexp(float_step(layout), np.clip(exponents - 1, least, 126))
            squares = np.ones((a.shape[0], (a.shape[1] + missing) // CELL))
        else:
            squares = squared_steps(b_raw, layout)
        d = np.pad(d, ((0, 0), (0, missing))).reshape(a.shape[0], -1, CELL)
        energy = np.where(d.any(axis=2), (d * d).mean(axis=2) * 12 / squares, 0.0)
        return energy, np.where(d.any(axis=2), (d * d).max(axis=2) / squares, 0.0)


def squared_steps(raw: NDArray[np.uint8], layout: BlockFormat) -> NDArray[np.float64]:
    """The squared step of every cell of a format of integer blocks, with what the rounding of scales adds."""
    columns = row_columns(layout.name, raw.shape[1])
    rows = UnpackedRows.empty(layout, raw.shape[0], columns)
    rows.fill(np.ascontiguousarray(raw), 0, raw.shape[0])
    step = rows.d.astype(np.float64).repeat(layout.block_size // layout.sub_block, axis=1) * rows.scales
    inside = cell_energies(layout)[rows.quants.astype(np.int64) + 128] * 12
    squares = (step * step).repeat(layout.sub_block, axis=1) * inside
    squares = squares.reshape(raw.shape[0], -1, CELL).mean(axis=2)
    extra = scale_rounding(layout)
    cells = layout.block_size // CELL
    d, dmin = (part.astype(np.float64).repeat(cells, axis=1) for part in (rows.d, rows.dmin))
    found: NDArray[np.float64] = squares + extra.of_d * d * d + extra.of_dmin * dmin * dmin + extra.fixed
    return found


def row_sums(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Sums of a, b, a^2, b^2 and (a - b)^2 of every row, ``float64[rows, 5]``, over pairs that are finite."""
    both = np.isfinite(a) & np.isfinite(b)
    x, y = (np.where(both, side, np.float32(0)).astype(np.float64) for side in (a, b))
    d = x - y
    return np.stack([part.sum(axis=1) for part in (x, y, x * x, y * y, d * d)], axis=1)


def _values(side: Side, first: int, end: int) -> NDArray[np.float32]:
    with np.errstate(all="ignore"):
        return side.values(np.array([first, end, 0, side.columns]))


def _padded(a: Side, b: Side) -> CellFigures:
    """Figures of rows that are not whole cells, or whose format the pass does not read, from f32."""
    columns = -(-a.columns // CELL) * CELL
    figures = CellFigures.of(a.n_rows, columns)
    step = max(1, _PART // max(1, columns))
    for first in range(0, a.n_rows, step):
        end = min(a.n_rows, first + step)
        x, y = _values(a, first, end), _values(b, first, end)
        figures.by_row[first:end] = row_sums(x, y)
        cells = slice(first * columns // CELL, end * columns // CELL)
        part = CellFigures(
            np.zeros((2, cells.stop - cells.start), np.uint8), np.zeros((end - first, ROW_SUMS))
        )
        # The steps stay those of b's format: its values say what they are, or else it is read as it is.
        plain = by_exponent(b.layout)
        as_stored = replace(b, rows=np.ascontiguousarray(b.rows[first:end]))
        other = _as_f32(y, columns) if plain else as_stored
        compare_sides(_as_f32(x, columns), other, into=part, steps_of=b.layout)
        figures.codes[:, cells] = part.codes
    return figures


def _as_f32(values: NDArray[np.float32], columns: int) -> Side:
    wide = np.zeros((len(values), columns), np.float32)
    wide[:, : values.shape[1]] = values
    return Side.of(wide.view(np.uint8), "F32", None, False)


@kernel("void(uint8[::1], int64[::1])")
def _count(codes: Any, counts: Any) -> None:
    """Add to `counts` how often each code is there."""
    # Four counters a code: a run of one code would wait for its own counter.
    several = np.zeros((4, 256), np.int64)
    whole = codes.size // 4 * 4
    for i in range(0, whole, 4):
        for j in range(4):
            several[j, codes[i + j]] += 1
    for i in range(whole, codes.size):
        several[0, codes[i]] += 1
    for code in range(256):
        for j in range(4):
            counts[code] += several[j, code]
