"""Sums of squares of a weight, and of the squares of its rounding cells, in one read of its bytes.

They are what the error of a product is predicted from (`driftscope.analysis.noise`): an error of energy
``e[t, k]`` in the activation leaves ``sum over k of e[t, k] w[j, k]^2`` in an output, which is summed over
the outputs with the weight's column sums, and over the tokens with its rows weighted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.kernels import float64
from driftscope.kernels.block_decoders import DECODERS
from driftscope.kernels.dequantize import dequantize
from driftscope.kernels.expected_error import EXPONENT, LEVELS, NONE, cell_energies, cell_kind
from driftscope.kernels.formats import BlockFormat, format_of, row_columns
from driftscope.kernels.jit import kernel
from driftscope.kernels.parallel import over_rows
from driftscope.kernels.unpack import UnpackedRows, check_raw

F64 = NDArray[np.float64]

_SLAB = 1 << 17


@dataclass(frozen=True)
class WeightEnergy:
    """Sums over a weight ``w[j, k]`` of r rows and k columns.

    Attributes:
        columns: ``float64[k]``, the sum of ``w^2`` over the rows.
        rows: ``float64[m, r]``, the sum of ``factors[i, k] * w^2`` over the columns.
        cell_columns: as `columns`, of the mean square error that the format is expected to have left in each
            value (`driftscope.kernels.expected_error`); zeros where that was not asked for.
        cell_rows: as `rows`, likewise.
        shift_columns: ``float64[k / sub_block]``, the sum over the rows of the square of what is added to, or
            taken off from, all values of a sub-block after its quants, which are not negative, were scaled:
            the minimum of Q4_K, the m of Q4_1, 32 scales of Q6_K. Zeros where that was not asked for.
        shift_rows: ``float64[m, r]``, the sum of ``shifts[i, s]`` times these squares over the sub-blocks.
    """

    columns: F64
    rows: F64
    cell_columns: F64
    cell_rows: F64
    shift_columns: F64
    shift_rows: F64


def weight_energy(
    raw: NDArray[np.uint8],
    dtype: str,
    factors: F64,
    *,
    cells: bool = False,
    shifts: F64 | None = None,
    threads: int = 1,
) -> WeightEnergy:
    """Sums of squares of stored rows.

    Args:
        raw: ``uint8[r, row_bytes]``, the stored rows.
        dtype: format name, see `driftscope.kernels.formats`.
        factors: ``float64[m, k]``.
        cells: whether to sum the cells too.
        shifts: ``float64[m, k / sub_block]``, or None not to sum shifts.
        threads: number of threads; the result does not depend on it.
    """
    n_rows, k = raw.shape[0], row_columns(dtype, raw.shape[1])
    factors = np.ascontiguousarray(factors, np.float64)
    slab = max(1, _SLAB // max(1, k) // 8) * 8
    n_slabs = -(-n_rows // slab)
    columns, cell_columns = np.zeros((n_slabs, k)), np.zeros((n_slabs, k))
    rows, cell_rows = np.zeros((2, factors.shape[0], n_rows))
    layout = format_of(dtype)
    with_cells = cells and cell_kind(layout) != NONE
    with_shifts = shifts is not None and layout.is_integer
    n_subs = k // layout.sub_block if with_shifts else 0
    shift_columns = np.zeros((n_slabs, n_subs))
    shift_rows = np.zeros((0 if shifts is None else shifts.shape[0], n_rows))

    def work(first: int, end: int) -> None:
        for index in range(first, end):
            part = slice(index * slab, min(n_rows, (index + 1) * slab))
            values = np.ascontiguousarray(dequantize(raw[part], dtype))
            squares = np.empty_like(values)
            _square(values, squares, columns[index])
            rows[:, part] = float64.matmul(factors, squares)
            if with_cells:
                _cells(raw[part], dtype, values, factors, cell_columns[index], cell_rows[:, part])
            if with_shifts:
                squares_of = _shifts(raw[part], layout)
                shift_columns[index] = np.sum(squares_of, axis=0)
                assert shifts is not None
                shift_rows[:, part] = float64.matmul(shifts, squares_of)

    over_rows(work, n_slabs, threads=threads)
    return WeightEnergy(
        np.sum(columns, axis=0),
        rows,
        np.sum(cell_columns, axis=0),
        cell_rows,
        np.sum(shift_columns, axis=0),
        shift_rows,
    )


def cell_energy_of_rows(raw: NDArray[np.uint8], dtype: str) -> F64:
    """The expected error energy of every value of some stored rows, ``float64[r, k]``."""
    values = np.ascontiguousarray(dequantize(raw, dtype))
    if cell_kind(format_of(dtype)) == NONE:
        return np.zeros(values.shape)
    found, width = _each_cell(raw, dtype, values)
    return np.repeat(found, width, axis=1)


@kernel("void(R(f4, 2), f4[:,::1], f8[::1])")
def _square(values: Any, squares: Any, columns: Any) -> None:
    for r in range(values.shape[0]):
        for c in range(values.shape[1]):
            square = values[r, c] * values[r, c]
            # A weight that is not finite is the business of the comparison, not of its expected noise.
            square = square if square <= np.float32(3.4e38) else np.float32(0.0)
            squares[r, c] = square
            columns[c] += np.float64(square)


def _cells(
    raw: NDArray[np.uint8], dtype: str, values: NDArray[np.float32], factors: F64, columns: F64, rows: F64
) -> None:
    found, width = _each_cell(raw, dtype, values)
    grouped = np.sum(factors.reshape(factors.shape[0], -1, width), axis=2) if width > 1 else factors
    columns += np.repeat(np.sum(found, axis=0), width)
    rows[:] = float64.matmul(grouped, found)


def _each_cell(raw: NDArray[np.uint8], dtype: str, values: NDArray[np.float32]) -> tuple[F64, int]:
    """Mean square errors ``float64[r, k / width]``, each that of `width` neighbours."""
    layout = format_of(dtype)
    kind = cell_kind(layout)
    cells = cell_energies(layout)
    if kind == EXPONENT:
        exponents = (values.view(np.uint32) >> np.uint32(23)) & np.uint32(0xFF)
        return cells[exponents], 1
    unpacked = _unpacked(raw, layout)
    steps = _scaled(unpacked.d, unpacked.scales, layout)
    if kind == LEVELS:
        wide = np.repeat(np.square(steps), layout.sub_block, axis=1)
        return wide * cells[unpacked.quants.astype(np.int64) + 128], 1
    return np.square(steps) / 12.0, layout.sub_block


def _shifts(raw: NDArray[np.uint8], layout: BlockFormat) -> F64:
    """Squares of what all values of a sub-block have in common, ``float64[r, k / sub_block]``."""
    unpacked = _unpacked(raw, layout)
    if layout.offset != "none":
        return np.square(_scaled(unpacked.dmin, unpacked.mins, layout))
    # Engines make the quants of small blocks signed first.
    bias = DECODERS[layout.name].bias if layout.block_size == 256 else 0
    return np.square(bias * _scaled(unpacked.d, unpacked.scales, layout))


def _unpacked(raw: NDArray[np.uint8], layout: BlockFormat) -> UnpackedRows:
    raw, columns = check_raw(raw, layout.name)
    unpacked = UnpackedRows.empty(layout, raw.shape[0], columns)
    unpacked.fill(raw, 0, raw.shape[0])
    return unpacked


def _scaled(d: NDArray[np.float32], integers: NDArray[np.int8], layout: BlockFormat) -> F64:
    """The scale of every sub-block; 0 where it is not finite."""
    each = layout.block_size // layout.sub_block
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = np.repeat(d.astype(np.float64), each, axis=1) * integers
    return np.where(np.isfinite(scaled), scaled, 0.0)
