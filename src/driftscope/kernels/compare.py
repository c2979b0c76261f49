"""Compare two stored tensors value by value, in one pass over their bytes.

A tile of values of both sides is decoded into the first-level cache, and every count and sum of it is taken
there; no copy of a tensor is made. Tiles are added up in slabs. Slabs depend on the shape alone, every sum
inside a slab runs in a fixed order, and slabs are added up with correctly rounded sums (``math.fsum``): the
result is the same bits whatever the number of threads, and on every host.

A slab takes the fast way (`compare_tile`) and, where that cannot answer, the exact one (`compare_exact`):
where a value is not finite, where a difference is too near to the bound of a class for f32, and where sums
that the fast way subtracts from each other would cancel. Figures of both ways mean the same.

`driftscope.kernels.reference.compare` is the same in plain NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.errors import InputError
from driftscope.kernels.compare_cells import (
    CELL,
    GROUP,
    by_exponent,
    code_blocks,
    code_floats,
    float_step,
    least_exponent,
)
from driftscope.kernels.compare_decode import BLOCK_VALUES, DIRECT, address_of, decode
from driftscope.kernels.compare_exact import FIGURES, TALLIES, compare_values, largest_of
from driftscope.kernels.compare_tile import (
    N_SUMS,
    STEP,
    add_powers,
    add_sums,
    classify,
)
from driftscope.kernels.dequantize import dequantize
from driftscope.kernels.expected_error import (
    EXPONENT,
    NONE,
    cell_energies,
    cell_kind,
    power_energy,
    smallest_exponent,
)
from driftscope.kernels.formats import BlockFormat, format_of
from driftscope.kernels.jit import device, kernel
from driftscope.kernels.parallel import over_rows
from driftscope.kernels.unpack import check_raw

SLAB_VALUES = 1 << 16
"""Values of a slab, about: few enough that a slab that takes the exact way costs little."""

# Values of a tile: both sides as f32 fill half of a first-level cache of 32 KiB.
_TILE = 2048

# A slab takes the exact way where the square of a mean is more than this part of the mean square, and where
# one side's sum of squares is more than this many times the other's.
_LEVEL, _UNLIKE = 0.25, 65536.0

# The bits of an f32 from which on it is not finite.
_INFINITE = 0x7F800000

# A tensor that is stored transposed is compared in squares of this many rows and columns.
_SQUARE = BLOCK_VALUES


@dataclass(frozen=True)
class TensorComparison:
    """Counts and sums of two tensors a and b of equal shape, elements in canonical row order.

    Sums are in float64 over the pairs in which both values are finite; `compared_count` says how many those
    are. Every other pair is counted in `nan_a` to `inf_b` and in nothing else. Values are compared as f32,
    their differences are taken in float64.

    Attributes:
        element_count: pairs.
        compared_count: pairs with both values finite.
        identical_count: compared pairs of equal value; -0.0 equals 0.0.
        small_count: compared pairs with 0 < |a - b| < 1e-3.
        medium_count: compared pairs with 1e-3 <= |a - b| < 1e-2.
        large_count: compared pairs with |a - b| >= 1e-2.
        nan_a: NaNs in a; nan_b likewise.
        inf_a: infinities in a; inf_b likewise.
        bit_identical: every pair has the same 32 bits once decoded to f32, signs of zeros and NaNs included.
        sum_a: sum of a; sum_b likewise.
        sum_aa: sum of a^2; sum_bb, sum_ab likewise.
        sum_abs: sum of |a - b|.
        sum_dd: sum of (a - b)^2.
        centred_aa: sum of (a - mean a)^2, computed about a shift and not as a difference of large sums;
            centred_bb likewise.
        max_diff: largest |a - b|, NaN where nothing was compared.
        max_index: flat index of the first pair with that difference, -1 where nothing was compared.
        max_value_a: a at that index; max_value_b likewise.
        expected_energy: what b's format is expected to leave of ``sum_dd`` (see `kernels.expected_error`), or
            None where the format is exact or has no prediction.
    """

    element_count: int
    compared_count: int
    identical_count: int
    small_count: int
    medium_count: int
    large_count: int
    nan_a: int
    nan_b: int
    inf_a: int
    inf_b: int
    bit_identical: bool
    sum_a: float
    sum_b: float
    sum_aa: float
    sum_bb: float
    sum_ab: float
    sum_abs: float
    sum_dd: float
    centred_aa: float
    centred_bb: float
    max_diff: float
    max_index: int
    max_value_a: float
    max_value_b: float
    expected_energy: float | None

    @property
    def mean_diff(self) -> float | None:
        """Mean of |a - b|."""
        return self.sum_abs / self.compared_count if self.compared_count else None

    @property
    def rmse(self) -> float | None:
        """Root of the mean of (a - b)^2."""
        return math.sqrt(self.sum_dd / self.compared_count) if self.compared_count else None

    @property
    def nmse(self) -> float | None:
        """Sum of (a - b)^2 over sum of a^2; 0 where all is zero, None where only a is."""
        return self._of_energy(self.sum_dd)

    @property
    def relative_l2(self) -> float | None:
        """Root of `nmse`."""
        return None if self.nmse is None else math.sqrt(self.nmse)

    @property
    def expected_nmse(self) -> float | None:
        """`expected_energy` over sum of a^2."""
        return None if self.expected_energy is None else self._of_energy(self.expected_energy)

    @property
    def cosine_similarity(self) -> float | None:
        """Cosine of the angle between a and b, in [-1, 1]: exactly 1 for equal values.

        Two tensors of zeros are equal and score 1; None where one alone is zero.
        """
        aa, bb = self.sum_aa, self.sum_bb
        if aa > 0 and bb > 0:
            length = math.sqrt(aa * bb)
            if max(aa, bb) > _UNLIKE * min(aa, bb):
                return max(-1.0, min(1.0, self.sum_ab / length))
            # What is missing to 1, of which the error is a part of itself and not of 1.
            difference = (aa - bb) / (math.sqrt(aa) + math.sqrt(bb))
            missing = (self.sum_dd - difference * difference) / (2.0 * length)
            return max(-1.0, min(1.0, 1.0 - missing))
        return 1.0 if self.compared_count and self.sum_aa == self.sum_bb else None

    @property
    def std_a(self) -> float | None:
        """Standard deviation of a over the compared pairs (n - 1)."""
        return self._std(self.centred_aa)

    @property
    def std_b(self) -> float | None:
        """Standard deviation of b over the compared pairs (n - 1)."""
        return self._std(self.centred_bb)

    @property
    def std_ratio(self) -> float | None:
        """`std_b` over `std_a`; None where a does not vary."""
        return self.std_b / self.std_a if self.std_a and self.std_b is not None else None

    def _std(self, centred: float) -> float | None:
        return math.sqrt(centred / (self.compared_count - 1)) if self.compared_count > 1 else None

    def _of_energy(self, energy: float) -> float | None:
        if self.sum_aa > 0:
            return energy / self.sum_aa
        return 0.0 if self.compared_count and energy == 0 else None


def compare(
    a_raw: NDArray[np.uint8],
    a_dtype: str,
    b_raw: NDArray[np.uint8],
    b_dtype: str,
    *,
    rows_a: NDArray[np.int64] | None = None,
    rows_b: NDArray[np.int64] | None = None,
    transposed_a: bool = False,
    transposed_b: bool = False,
    threads: int = 1,
) -> TensorComparison:
    """Compare tensor a with tensor b.

    Args:
        a_raw: ``uint8[rows, row_bytes]``, the stored bytes of a; may be a read-only memory map.
        a_dtype: format name of a, see `driftscope.kernels.formats`. F64 is rounded to f32.
        b_raw: the stored bytes of b.
        b_dtype: format name of b.
        rows_a: ``int64[rows]``, stored row of each canonical row of a (of each canonical column where a is
            stored transposed); None where they are the same.
        rows_b: likewise of b.
        transposed_a: a's stored rows are its canonical columns.
        transposed_b: likewise of b.
        threads: number of threads; the result does not depend on it.

    Raises:
        InputError: unknown format, a row that is not a whole number of blocks, or unequal shapes.
    """
    a = Side.of(a_raw, a_dtype, rows_a, transposed_a)
    b = Side.of(b_raw, b_dtype, rows_b, transposed_b)
    return compare_sides(a, b, threads=threads)[0]


@dataclass(frozen=True)
class CellFigures:
    """Where a comparison leaves what it sees of cells and of rows.

    Attributes:
        codes: ``uint8[2, rows * columns / CELL]``, see `compare_cells`: energies, then peaks.
        by_row: ``float64[rows, ROW_SUMS]``: sums of a, b, a^2, b^2 and (a - b)^2. Those of the rows of a slab
            that took the exact way are not to be used.
    """

    codes: NDArray[np.uint8]
    by_row: NDArray[np.float64]

    @classmethod
    def of(cls, n_rows: int, columns: int) -> CellFigures:
        """Room for a tensor of rows of whole cells."""
        return cls(np.zeros((2, n_rows * columns // CELL), np.uint8), np.zeros((n_rows, ROW_SUMS)))


ROW_SUMS = 5


def compare_sides(
    a: Side,
    b: Side,
    *,
    into: CellFigures | None = None,
    steps_of: BlockFormat | None = None,
    threads: int = 1,
) -> tuple[TensorComparison, NDArray[np.int64]]:
    """Compare two sides, as `compare` does.

    Args:
        a: one side.
        b: the other.
        into: gets the figures of cells and rows, where both sides are `Side.direct` and not transposed and
            rows are whole cells.
        steps_of: the format whose steps errors of cells are in; b's by default.
        threads: number of threads.

    Returns:
        The comparison, and the rows (``int64[n, 2]``, first and end) of the slabs that took the exact way.
    """
    if (a.n_rows, a.columns) != (b.n_rows, b.columns):
        raise InputError(
            f"tensors of {a.n_rows} x {a.columns} and {b.n_rows} x {b.columns} values "
            "cannot be compared: expected equal shapes"
        )
    plan = _in_squares(a) if a.transposed or b.transposed else _in_rows(a)
    figures = np.zeros((len(plan), FIGURES))
    tallies = np.zeros((len(plan), TALLIES), np.int64)
    exactly = np.zeros(len(plan), np.bool_)
    constants = np.array([power_energy(b.layout)])
    cells = cell_energies(b.layout)
    layout = steps_of or b.layout
    by_cell = np.array([into is not None, by_exponent(layout), least_exponent(layout)], np.int64)
    float_square = np.array([float_step(layout) ** 2])
    room = into or CellFigures.of(0, 0)

    def work(first: int, end: int) -> None:
        # Formats that the kernel does not read go through f32, a slab at a time.
        step = end - first if a.direct and b.direct else 1
        for start in range(first, end, step):
            stop = min(end, start + step)
            x, y = a.part(plan[start]), b.part(plan[start])
            _compare_slabs(
                *(x.parameters, x.raw, x.rows, y.parameters, y.raw, y.rows),
                *(plan[start:stop], constants, cells, figures[start:stop], tallies[start:stop]),
                *(by_cell, float_square, room.codes, room.by_row),
            )
        for slab in first + np.flatnonzero(tallies[first:end, 9]):
            exactly[slab] = True
            compare_values(*_flat(a, b, plan[slab]), figures[slab], tallies[slab])

    over_rows(work, len(plan), threads=threads)
    largest = _largest(a, plan, figures, tallies[:, 10])
    predicted = cell_kind(b.layout) != NONE
    found = _pool(figures, tallies, a.n_rows * a.columns, largest, predicted=predicted)
    return found, plan[exactly, :2]


def merge(parts: Sequence[TensorComparison]) -> TensorComparison:
    """Compare what several comparisons saw, as one: the parts lie one after another in canonical order."""
    tallies = np.array(
        [
            (
                p.compared_count,
                p.identical_count,
                p.identical_count + p.small_count,
                p.identical_count + p.small_count + p.medium_count,
                p.nan_a,
                p.nan_b,
                p.inf_a,
                p.inf_b,
                not p.bit_identical,
                *(False, -1),
            )
            for p in parts
        ],
        np.int64,
    ).reshape(-1, TALLIES)
    figures = np.array(
        [
            (
                *(p.sum_a, p.sum_b, p.sum_aa, p.sum_bb, p.sum_ab, p.sum_abs, p.sum_dd),
                *(p.centred_aa, p.centred_bb),
                *(p.max_diff if p.compared_count else 0.0, p.expected_energy or 0.0, 0.0, 0.0),
            )
            for p in parts
        ]
    ).reshape(-1, FIGURES)
    expected = [p.expected_energy for p in parts]
    starts = np.cumsum([0, *(p.element_count for p in parts)])
    compared = [(p, int(start)) for p, start in zip(parts, starts, strict=False) if p.compared_count]
    largest = _NOWHERE
    if compared:
        part, start = max(compared, key=lambda item: item[0].max_diff)
        largest = (start + part.max_index, part.max_value_a, part.max_value_b)
    return _pool(figures, tallies, int(starts[-1]), largest, predicted=bool(parts) and None not in expected)


def rows_of_slab(columns: int) -> int:
    """Rows that are added up at a time: about `SLAB_VALUES` values, at least one row."""
    return max(1, SLAB_VALUES // max(1, columns))


def _in_rows(side: Side) -> NDArray[np.int64]:
    """Slabs of whole rows, ``int64[slabs, 4]``: first row and end, first column and end."""
    if not side.columns:
        return np.zeros((0, 4), np.int64)
    step = rows_of_slab(side.columns)
    first = np.arange(0, side.n_rows, step, dtype=np.int64)
    end = np.minimum(first + step, side.n_rows)
    return np.stack([first, end, np.zeros_like(first), np.full_like(first, side.columns)], axis=1)


def _in_squares(side: Side) -> NDArray[np.int64]:
    """As `_in_rows`, in squares."""
    corners = [(r, c) for r in range(0, side.n_rows, _SQUARE) for c in range(0, side.columns, _SQUARE)]
    first = np.array(corners, np.int64).reshape(-1, 2)
    end = np.minimum(first + _SQUARE, (side.n_rows, side.columns))
    return np.ascontiguousarray(np.stack([first[:, 0], end[:, 0], first[:, 1], end[:, 1]], axis=1))


# Flat index of the first pair with the largest |a - b|, a and b there.
_Largest = tuple[int, float, float]
_NOWHERE: _Largest = (-1, math.nan, math.nan)


def _flat(a: Side, b: Side, place: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The values of a slab."""
    return a.values(place).reshape(-1), b.values(place).reshape(-1)


def _largest(
    a: Side, plan: NDArray[np.int64], figures: NDArray[np.float64], found: NDArray[np.int64]
) -> _Largest:
    """The first pair with the largest difference, of those that the slabs have found; -1 is none."""
    slabs = np.flatnonzero(found >= 0)
    if not len(slabs):
        return _NOWHERE
    slabs = slabs[figures[slabs, 9] == figures[slabs, 9].max()]
    first_row, _, first_column, end_column = plan[slabs].T
    row, column = np.divmod(found[slabs], end_column - first_column)
    indices = (first_row + row) * a.columns + first_column + column
    best = slabs[np.argmin(indices)]
    return int(indices.min()), float(figures[best, 11]), float(figures[best, 12])


def _pool(
    figures: NDArray[np.float64],
    tallies: NDArray[np.int64],
    element_count: int,
    largest: _Largest,
    *,
    predicted: bool,
) -> TensorComparison:
    """Add up slabs; centred sums by the parallel-axis theorem (Chan, Golub and LeVeque 1983)."""
    sums = [math.fsum(column) for column in figures.T.tolist()]
    counts = tallies.sum(axis=0).tolist()
    compared, identical, below_small, below_medium = counts[:4]
    filled = tallies[:, 0] > 0
    weights = tallies[filled, 0].astype(np.float64)
    centred = []
    for total, inside in ((0, 7), (1, 8)):
        away = figures[filled, total] / weights - (sums[total] / compared if compared else 0.0)
        centred.append(math.fsum([sums[inside], *(weights * away * away).tolist()]))
    return TensorComparison(
        element_count=element_count,
        compared_count=compared,
        identical_count=identical,
        small_count=below_small - identical,
        medium_count=below_medium - below_small,
        large_count=compared - below_medium,
        nan_a=counts[4],
        nan_b=counts[5],
        inf_a=counts[6],
        inf_b=counts[7],
        bit_identical=counts[8] == 0,
        sum_a=sums[0],
        sum_b=sums[1],
        sum_aa=sums[2],
        sum_bb=sums[3],
        sum_ab=sums[4],
        sum_abs=sums[5],
        sum_dd=sums[6],
        centred_aa=centred[0],
        centred_bb=centred[1],
        max_diff=float(figures[filled, 9].max()) if compared else math.nan,
        max_index=largest[0],
        max_value_a=largest[1],
        max_value_b=largest[2],
        expected_energy=sums[10] if predicted else None,
    )


@dataclass(frozen=True)
class Side:
    """One of the two tensors: its bytes, its order and what the kernel must know of its format.

    Attributes:
        raw: the stored bytes, ``uint8[stored rows, row_bytes]``.
        layout: the format.
        rows: stored row of each canonical row, or of each canonical column.
        stored_columns: values of a stored row.
        transposed: stored rows are canonical columns.
        origin: canonical row and column of the first value; others than the first for a part.
    """

    raw: NDArray[np.uint8]
    layout: BlockFormat
    rows: NDArray[np.int64]
    stored_columns: int
    transposed: bool = False
    origin: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, raw: NDArray[np.uint8], dtype: str, rows: NDArray[np.int64] | None, transposed: bool) -> Side:
        layout = format_of(dtype)
        raw, columns = check_raw(raw, dtype)
        if rows is None:
            rows = np.arange(raw.shape[0], dtype=np.int64)
        elif len(rows) and not 0 <= rows.min() <= rows.max() < raw.shape[0]:
            raise ValueError(f"rows {rows.min()} to {rows.max()} of a tensor of {raw.shape[0]} rows")
        return cls(raw, layout, np.ascontiguousarray(rows, np.int64), columns, transposed)

    @property
    def n_rows(self) -> int:
        return self.stored_columns if self.transposed else len(self.rows)

    @property
    def columns(self) -> int:
        return len(self.rows) if self.transposed else self.stored_columns

    @property
    def direct(self) -> bool:
        return self.layout.name in DIRECT

    @property
    def parameters(self) -> NDArray[np.int64]:
        layout = self.layout
        return np.array(
            [
                *(layout.ggml_type, layout.block_size, layout.block_bytes),
                *(self.transposed, *self.origin, cell_kind(layout), smallest_exponent(layout)),
            ],
            np.int64,
        )

    def part(self, place: NDArray[np.int64]) -> Side:
        """The tensor itself, or a slab of it in f32 where the kernel does not read the format."""
        if self.direct:
            return self
        values = self.values(place)
        order = np.arange(values.shape[0], dtype=np.int64)
        origin = (int(place[0]), int(place[2]))
        return Side(values.view(np.uint8), format_of("F32"), order, values.shape[1], origin=origin)

    def values(self, place: NDArray[np.int64]) -> NDArray[np.float32]:
        """A slab as f32, canonical rows and columns."""
        rows, columns = slice(place[0], place[1]), slice(place[2], place[3])
        if self.transposed:
            rows, columns = columns, rows
        size, nbytes = self.layout.block_size, self.layout.block_bytes
        stored = self.raw[self.rows[rows], columns.start // size * nbytes : columns.stop // size * nbytes]
        values = dequantize(stored, self.layout.name)
        return np.ascontiguousarray(values.T if self.transposed else values)


@kernel(
    "void(R(int64, 1), R(uint8, 2), R(int64, 1), R(int64, 1), R(uint8, 2), R(int64, 1), R(int64, 2),"
    " R(float64, 1), R(float64, 1), float64[:, ::1], int64[:, ::1], int64[::1], float64[::1],"
    " uint8[:, ::1], float64[:, ::1])"
)
def _compare_slabs(
    side_a: Any,
    raw_a: Any,
    rows_a: Any,
    side_b: Any,
    raw_b: Any,
    rows_b: Any,
    plan: Any,
    constants: Any,
    cells: Any,
    figures: Any,
    tallies: Any,
    by_cell: Any,
    float_square: Any,
    codes: Any,
    by_row: Any,
) -> None:
    """Compare slab after slab; row s of `figures` and `tallies` is slab s of `plan`.

    `by_cell` says whether cells are looked at as well, whether errors are taken in powers of two, and the
    smallest exponent of these; `float_square` is their squared step.
    """
    a, b = _tile(), _tile()
    square_a = np.empty(_SQUARE * _SQUARE if side_a[3] else 0, np.float32)
    square_b = np.empty(_SQUARE * _SQUARE if side_b[3] else 0, np.float32)
    quants, steps = np.empty(BLOCK_VALUES, np.int8), np.empty(8, np.float32)
    squares, unused = np.empty(_TILE // CELL, np.float32), np.empty(_TILE // CELL, np.float32)
    coded = np.empty(2 * GROUP, np.uint8)
    to_coded, to_codes, to_steps = address_of(coded), address_of(codes), address_of(squares)
    cells_wanted, powers_of_two, least_of_cells = by_cell[0] != 0, by_cell[1] != 0, np.int32(by_cell[2])
    if powers_of_two:
        squares[:] = np.float32(float_square[0])
    base_a, base_b = address_of(raw_a), address_of(raw_b)
    stride_a, stride_b = raw_a.shape[1], raw_b.shape[1]
    to_a, to_b = address_of(a), address_of(b)
    column = np.empty(_SQUARE, np.float32)
    sums, before = np.empty(N_SUMS * 4), np.empty(ROW_SUMS)
    powers = np.empty(4)
    kind_a, block_a, size_a, transposed_a = side_a[0], side_a[1], side_a[2], side_a[3] != 0
    kind_b, block_b, size_b, transposed_b = side_b[0], side_b[1], side_b[2], side_b[3] != 0
    row_a, column_a, row_b, column_b = side_a[4], side_a[5], side_b[4], side_b[5]
    # Bytes of eight values, which are fetched while eight others are added up.
    ahead_a, ahead_b = 8 * size_a // block_a, 8 * size_b // block_b
    powers_of_b, least = side_b[6] == EXPONENT, np.int32(side_b[7])
    largest, any_found = np.int32(0), False
    for s in range(plan.shape[0]):
        first_row, end_row, first_column, end_column = plan[s, 0], plan[s, 1], plan[s, 2], plan[s, 3]
        width = end_column - first_column
        cells_a_row = width // CELL
        sums[:] = 0.0
        before[:] = 0.0
        powers[:] = 0.0
        energy, start = 0.0, 0
        figures[s, 9] = -1.0
        tallies[s, 10] = -1
        same, above_small, above_medium, differs, near = 0, 0, 0, False, False
        if side_a[3]:
            _fill_square(side_a, raw_a, rows_a, plan[s], square_a, column, cells, quants, steps, unused)
        if side_b[3]:
            energy += _fill_square(
                side_b, raw_b, rows_b, plan[s], square_b, column, cells, quants, steps, unused
            )
        r, c = first_row, first_column
        while r < end_row:
            count = 0
            row, first_cell = r, c // CELL
            # With sums by row a tile ends where its row does. Rows are whole numbers of steps then, so that
            # every sum is of the same terms in the same order; and energies are of the same runs.
            room = _TILE - start % _TILE if cells_wanted else _TILE
            while count < room and r < end_row and (r == row or not cells_wanted):
                length = min(room - count, end_column - c)
                at = (r - first_row) * width + c - first_column
                if transposed_a:
                    a[count : count + length] = square_a[at : at + length]
                else:
                    place = base_a + rows_a[r - row_a] * stride_a + (c - column_a) // block_a * size_a
                    to = to_a + 4 * count
                    decode(kind_a, block_a, size_a, place, length, to, cells, quants, steps, unused)
                if transposed_b:
                    b[count : count + length] = square_b[at : at + length]
                else:
                    place = base_b + rows_b[r - row_b] * stride_b + (c - column_b) // block_b * size_b
                    to = to_b + 4 * count
                    energy += decode(
                        kind_b, block_b, size_b, place, length, to, cells, quants, steps, squares
                    )
                count += length
                c += length
                if c == end_column:
                    c = first_column
                    r += 1
            padded = -(-count // STEP) * STEP
            if powers_of_b:
                for i in range(count, padded):
                    b[i] = np.inf
                add_powers(b, padded // STEP, least, powers)
            for i in range(count, padded):
                a[i] = 0.0
                b[i] = 0.0
            # What comes next is fetched while this tile is added up.
            next_a, next_b = base_a, base_b
            if not transposed_a and r - row_a < rows_a.size:
                next_a += rows_a[r - row_a] * stride_a + (c - column_a) // block_a * size_a
            if not transposed_b and r - row_b < rows_b.size:
                next_b += rows_b[r - row_b] * stride_b + (c - column_b) // block_b * size_b
            add_sums(to_a, to_b, padded // 8, sums, next_a, ahead_a, next_b, ahead_b)
            if cells_wanted:
                of_tile = row * cells_a_row + first_cell
                n_cells = count // CELL
                whole = n_cells // GROUP
                to_energy, to_peak = to_codes + of_tile, to_codes + codes.shape[1] + of_tile
                _code(powers_of_two, to_a, to_b, to_steps, whole, least_of_cells, to_energy, to_peak)
                done = whole * GROUP
                if done < n_cells:  # the codes of a whole group would reach into what others write
                    x, y, z = to_a + 4 * CELL * done, to_b + 4 * CELL * done, to_steps + 4 * done
                    _code(powers_of_two, x, y, z, 1, least_of_cells, to_coded, to_coded + GROUP)
                    for i in range(n_cells - done):
                        codes[0, of_tile + done + i] = coded[i]
                        codes[1, of_tile + done + i] = coded[GROUP + i]
                if r != row:
                    _end_row(sums, before, by_row[row])
            found, equal, small, medium, unlike, close = classify(to_a, to_b, count, padded)
            same += equal
            above_small += small
            above_medium += medium
            differs = differs or unlike
            near = near or close
            # Only a tile that may hold the largest difference of all is looked through. Which slabs are
            # depends on where this call began, but not whether the one with the largest is.
            if found > largest or found >= _INFINITE or (found == largest and (found > 0 or not any_found)):
                if largest_of(a, b, count, start, figures[s], tallies[s]):
                    any_found = True
                if found < _INFINITE:
                    largest = found
            start += count
        energy += ((powers[0] + powers[1]) + (powers[2] + powers[3])) * constants[0]
        n = (end_row - first_row) * width
        tallies[s, 0], tallies[s, 1] = n, same
        tallies[s, 2], tallies[s, 3] = n - above_small, n - above_medium
        tallies[s, 8] = 1 if differs else 0
        tallies[s, 9] = 0 if _finish(sums, n, figures[s]) and not near else 1
        figures[s, 10] = energy


@device
def _code(
    powers_of_two: bool, a: int, b: int, squares: int, groups: int, least: int, energies: int, peaks: int
) -> None:
    if powers_of_two:
        code_floats(a, b, squares, groups, least, energies, peaks)
    else:
        code_blocks(a, b, squares, groups, least, energies, peaks)


@device
def _end_row(sums: Any, before: Any, by_row: Any) -> None:
    """Set the sums of a row to what has come to those of its slab since the row before."""
    for i in range(ROW_SUMS):
        # Sums of a and b have four lanes each, those of squares eight.
        first, end = (4 * i, 4 * i + 4) if i < 2 else (8 * i - 4, 8 * i + 4)
        now = 0.0
        for lane in range(first, end):
            now += sums[lane]
        by_row[i] = now - before[i]
        before[i] = now


@device
def _tile() -> Any:
    """Room for a tile, at the start of a cache line: a vector that straddles two takes twice as long."""
    room = np.empty(_TILE + 16, np.float32)
    first = (-address_of(room) % 64) // 4
    return room[first : first + _TILE]


@device
def _fill_square(
    side: Any,
    raw: Any,
    rows: Any,
    place: Any,
    square: Any,
    column: Any,
    cells: Any,
    quants: Any,
    steps: Any,
    squares: Any,
) -> Any:
    """Decode columns, which are stored as rows, into the rows of a square."""
    n_rows, width = place[1] - place[0], place[3] - place[2]
    first = address_of(raw) + place[0] // side[1] * side[2]
    energy = 0.0
    for c in range(width):
        stored = first + rows[place[2] + c] * raw.shape[1]
        out = address_of(column)
        energy += decode(side[0], side[1], side[2], stored, n_rows, out, cells, quants, steps, squares)
        for r in range(n_rows):
            square[r * width + c] = column[r]
    return energy


@device
def _finish(sums: Any, count: int, figures: Any) -> bool:
    """Set the figures of a slab of `count` values from its sums.

    Returns:
        Whether they are sound: a value that is not finite leaves no finite sum of squares.
    """
    totals = np.zeros(N_SUMS)
    for i in range(N_SUMS):
        for lane in range(4):
            totals[i] += sums[4 * i + lane]
    sum_a, sum_b = totals[0], totals[1]
    aa, bb, dd = totals[3] + totals[4], totals[5] + totals[6], totals[7] + totals[8]
    n = np.float64(count)
    figures[0], figures[1], figures[2], figures[3] = sum_a, sum_b, aa, bb
    # As exact as a sum of products as long as a and b are of like size.
    figures[4] = (aa + bb - dd) / 2.0
    figures[5], figures[6] = totals[2], dd
    figures[7], figures[8] = aa - sum_a * sum_a / n, bb - sum_b * sum_b / n
    sound = np.isfinite(dd) and np.isfinite(aa) and np.isfinite(bb)
    sound = sound and sum_a * sum_a <= _LEVEL * n * aa and sum_b * sum_b <= _LEVEL * n * bb
    return bool(sound and max(aa, bb) <= _UNLIKE * min(aa, bb))
