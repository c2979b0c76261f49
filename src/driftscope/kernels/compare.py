"""Compare two stored tensors value by value, in one pass over their bytes.

A slab of rows of both sides is decoded into cache, and one fused loop takes every count and sum of it. The
slabs depend on the shape alone, every sum inside a slab runs in a fixed order, and slabs are added up with
correctly rounded sums (``math.fsum``): the result is the same bits whatever the number of threads, and on
every host.

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
from driftscope.kernels.compare_tile import COUNTS, LANES, SUMS, TILE, add_tile, load_u16, load_u32
from driftscope.kernels.dequantize import _OFFSETS, _expand_rows, dequantize
from driftscope.kernels.expected_error import NONE, cell_energies, cell_kind, row_energy
from driftscope.kernels.formats import BlockFormat, format_of
from driftscope.kernels.jit import bits_to_float, device, kernel
from driftscope.kernels.parallel import over_rows
from driftscope.kernels.unpack import _half, check_raw, unpack_rows

# Two slabs of f32, and what they are decoded from, fit the second-level cache of current processors.
SLAB_VALUES = 1 << 14

# Columns of a slab's results, in the order in which `_pool` reads them.
_FIGURES, _TALLIES = 11, 9


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
        if self.sum_aa > 0 and self.sum_bb > 0:
            # The root of a rounded square is exact, which a product of two roots is not.
            return max(-1.0, min(1.0, self.sum_ab / math.sqrt(self.sum_aa * self.sum_bb)))
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
    threads: int = 1,
) -> TensorComparison:
    """Compare tensor a with tensor b.

    Args:
        a_raw: ``uint8[rows, row_bytes]``, the stored bytes of a; may be a read-only memory map.
        a_dtype: format name of a, see `driftscope.kernels.formats`. F64 is rounded to f32.
        b_raw: the stored bytes of b.
        b_dtype: format name of b.
        rows_a: ``int64[rows]``, stored row of each canonical row of a; None where they are the same.
        rows_b: likewise of b.
        threads: number of threads; the result does not depend on it.

    Raises:
        InputError: unknown format, a row that is not a whole number of blocks, or unequal shapes.
    """
    a = _Side.of(a_raw, a_dtype, rows_a)
    b = _Side.of(b_raw, b_dtype, rows_b)
    if (len(a.rows), a.columns) != (len(b.rows), b.columns):
        raise InputError(
            f"tensors of {len(a.rows)} x {a.columns} and {len(b.rows)} x {b.columns} values "
            "cannot be compared: expected equal shapes"
        )
    slab = rows_of_slab(a.columns)
    n_slabs = -(-len(a.rows) // slab) if a.columns else 0
    figures = np.zeros((n_slabs, _FIGURES))
    tallies = np.zeros((n_slabs, _TALLIES), np.int64)
    cells = cell_energies(b.layout)

    def work(first: int, end: int) -> None:
        # Formats without a decoder here go through whole slabs of f32, a few at a time.
        step = end - first if a.native and b.native else 16
        for start in range(first, end, step):
            stop = min(end, start + step)
            rows = slice(start * slab, min(stop * slab, len(a.rows)))
            x, y = a.part(rows), b.part(rows)
            _compare_slabs(
                x.parameters,
                x.raw,
                x.rows,
                y.parameters,
                y.raw,
                y.rows,
                cells,
                a.columns,
                slab,
                figures[start:stop],
                tallies[start:stop],
            )

    over_rows(work, n_slabs, threads=threads)
    largest = _NOWHERE
    worst = _worst(figures, tallies)
    if worst >= 0:
        rows = slice(worst * slab, min((worst + 1) * slab, len(a.rows)))
        largest = _largest(a.values(rows), b.values(rows), rows.start * a.columns)
    predicted = cell_kind(b.layout) != NONE
    return _pool(figures, tallies, len(a.rows) * a.columns, largest, predicted=predicted)


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
            )
            for p in parts
        ],
        np.int64,
    ).reshape(-1, _TALLIES)
    figures = np.array(
        [
            (
                *(p.sum_a, p.sum_b, p.sum_aa, p.sum_bb, p.sum_ab, p.sum_abs, p.sum_dd),
                *(p.centred_aa, p.centred_bb),
                *(p.max_diff if p.compared_count else 0.0, p.expected_energy or 0.0),
            )
            for p in parts
        ]
    ).reshape(-1, _FIGURES)
    expected = [p.expected_energy for p in parts]
    starts = np.cumsum([0, *(p.element_count for p in parts)])
    worst = _worst(figures, tallies)
    largest = _NOWHERE
    if worst >= 0:
        part = parts[worst]
        largest = (int(starts[worst]) + part.max_index, part.max_value_a, part.max_value_b)
    return _pool(figures, tallies, int(starts[-1]), largest, predicted=bool(parts) and None not in expected)


def rows_of_slab(columns: int) -> int:
    """Rows that are compared at a time: about `SLAB_VALUES` values, at least one row."""
    return max(1, SLAB_VALUES // max(1, columns))


_NOWHERE = (-1, math.nan, math.nan)


def _worst(figures: NDArray[np.float64], tallies: NDArray[np.int64]) -> int:
    """The first slab with the largest difference, -1 where no pair was compared."""
    if not tallies[:, 0].any():
        return -1
    return int(np.argmax(np.where(tallies[:, 0] > 0, figures[:, 9], -1.0)))


def _largest(a: NDArray[np.float32], b: NDArray[np.float32], start: int) -> tuple[int, float, float]:
    """Flat index and values of the first pair with the largest difference; ``a[0, 0]`` is pair `start`."""
    x, y = a.reshape(-1), b.reshape(-1)
    both = np.isfinite(x) & np.isfinite(y)
    x64, y64 = np.where(both, x, 0.0).astype(np.float64), np.where(both, y, 0.0).astype(np.float64)
    i = int(np.argmax(np.where(both, np.abs(x64 - y64), -1.0)))
    return start + i, float(x[i]), float(y[i])


def _pool(
    figures: NDArray[np.float64],
    tallies: NDArray[np.int64],
    element_count: int,
    largest: tuple[int, float, float],
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
class _Side:
    """One of the two tensors: its bytes, its row order and what the kernel must know of its format."""

    raw: NDArray[np.uint8]
    layout: BlockFormat
    rows: NDArray[np.int64]
    columns: int

    @classmethod
    def of(cls, raw: NDArray[np.uint8], dtype: str, rows: NDArray[np.int64] | None) -> _Side:
        layout = format_of(dtype)
        raw, columns = check_raw(raw, dtype)
        if rows is None:
            rows = np.arange(raw.shape[0], dtype=np.int64)
        elif len(rows) and not 0 <= rows.min() <= rows.max() < raw.shape[0]:
            raise ValueError(f"rows {rows.min()} to {rows.max()} of a tensor of {raw.shape[0]} rows")
        return cls(raw, layout, np.ascontiguousarray(rows, np.int64), columns)

    @property
    def native(self) -> bool:
        return self.layout.is_integer or self.layout.name in ("F32", "F16", "BF16")

    @property
    def parameters(self) -> NDArray[np.int64]:
        layout = self.layout
        offset = _OFFSETS[layout.offset]
        return np.array(
            [layout.ggml_type, layout.sub_block, layout.block_size, offset, cell_kind(layout)], np.int64
        )

    def part(self, rows: slice) -> _Side:
        """Some canonical rows, as f32 where the kernel has no decoder for the format."""
        if self.native:
            return _Side(self.raw, self.layout, self.rows[rows], self.columns)
        values = self.values(rows)
        order = np.arange(values.shape[0], dtype=np.int64)
        return _Side(values.view(np.uint8), format_of("F32"), order, self.columns)

    def values(self, rows: slice) -> NDArray[np.float32]:
        return np.ascontiguousarray(dequantize(self.raw[self.rows[rows]], self.layout.name))


_unpack_rows = device(unpack_rows.__wrapped__)  # type: ignore[attr-defined]
_expand = device(_expand_rows.__wrapped__)  # type: ignore[attr-defined]
_F32 = format_of("F32").ggml_type
_F16 = format_of("F16").ggml_type
_BF16 = format_of("BF16").ggml_type


@kernel(
    "void(R(int64, 1), R(uint8, 2), R(int64, 1), R(int64, 1), R(uint8, 2), R(int64, 1), R(float64, 1),"
    " int64, int64, float64[:, ::1], int64[:, ::1])"
)
def _compare_slabs(
    format_a: Any,
    raw_a: Any,
    rows_a: Any,
    format_b: Any,
    raw_b: Any,
    rows_b: Any,
    cells: Any,
    columns: int,
    slab: int,
    figures: Any,
    tallies: Any,
) -> None:
    """Compare slab after slab of `slab` rows; row s of `figures` and `tallies` is slab s."""
    capacity = -(-slab * columns // TILE) * TILE
    a = np.empty(capacity, np.float32)
    b = np.empty(capacity, np.float32)
    quants_a, scales_a, mins_a, d_a, dmin_a = _scratch(format_a, columns)
    quants_b, scales_b, mins_b, d_b, dmin_b = _scratch(format_b, columns)
    for s in range(figures.shape[0]):
        first = s * slab
        n_rows = min(slab, rows_a.size - first)
        count = n_rows * columns
        expected = 0.0
        for r in range(n_rows):
            x = a[r * columns : (r + 1) * columns]
            y = b[r * columns : (r + 1) * columns]
            _decode(format_a, raw_a, rows_a[first + r], quants_a, scales_a, mins_a, d_a, dmin_a, x)
            _decode(format_b, raw_b, rows_b[first + r], quants_b, scales_b, mins_b, d_b, dmin_b, y)
            expected += row_energy(
                format_b[4], format_b[1], format_b[2], quants_b[0], scales_b[0], d_b[0], y, cells
            )
        # NaN fills the last tile: such pairs enter no sum.
        padded = -(-count // TILE) * TILE
        a[count:padded] = np.nan
        b[count:padded] = np.nan
        _compare_values(a, b, count, padded, figures[s], tallies[s])
        figures[s, 10] = expected


@device
def _scratch(layout: Any, columns: int) -> Any:
    """Room for one unpacked row."""
    subs = columns // layout[1] if layout[1] > 0 else 0
    blocks = columns // layout[2]
    return (
        np.zeros((1, columns), np.int8),
        np.zeros((1, subs), np.int8),
        np.zeros((1, subs), np.int8),
        np.zeros((1, blocks), np.float32),
        np.zeros((1, blocks), np.float32),
    )


@device
def _decode(
    layout: Any, raw: Any, row: int, quants: Any, scales: Any, mins: Any, d: Any, dmin: Any, out: Any
) -> None:
    """The values of a stored row."""
    source = raw[row]
    if layout[0] == _F32:
        for i in range(out.size):
            out[i] = bits_to_float(load_u32(source, 4 * i))
    elif layout[0] == _BF16:
        for i in range(out.size):
            out[i] = bits_to_float(np.uint32(np.uint32(load_u16(source, 2 * i)) << np.uint32(16)))
    elif layout[0] == _F16:
        for i in range(out.size):
            out[i] = _half(source, 2 * i)
    else:
        _unpack_rows(layout[0], raw, row, row + 1, quants, scales, mins, d, dmin)
        _expand(layout[1], layout[2], layout[3], quants, scales, mins, d, dmin, out.reshape((1, out.size)))


@device
def _compare_values(a: Any, b: Any, count: int, padded: int, figures: Any, tallies: Any) -> None:
    """Counts and sums of the first `count` values of a and b; NaN fills them up to `padded`."""
    shift_a, shift_b = 0.0, 0.0
    # Moments are taken about the first pair. Where that is an outlier it is part of the variance itself,
    # so what cancels is at most `count` roundings.
    for i in range(count):
        if np.isfinite(a[i]) and np.isfinite(b[i]):
            shift_a, shift_b = np.float64(a[i]), np.float64(b[i])
            break
    sums = np.zeros(SUMS * LANES)
    counts = np.zeros(COUNTS * LANES, np.int64)
    for start in range(0, padded, TILE):
        add_tile(a, b, start, shift_a, shift_b, sums, counts)
    totals = np.zeros(SUMS)
    for i in range(SUMS):
        for lane in range(LANES):
            value = sums[i * LANES + lane]
            totals[i] = max(totals[i], value) if i == SUMS - 1 else totals[i] + value
    for i in range(4):
        for lane in range(LANES):
            tallies[i] += counts[i * LANES + lane]
    for lane in range(LANES):
        tallies[8] |= counts[4 * LANES + lane]
    tallies[8] = 1 if tallies[8] != 0 else 0
    if tallies[0] < count:
        for i in range(count):
            tallies[4] += 1 if np.isnan(a[i]) else 0
            tallies[5] += 1 if np.isnan(b[i]) else 0
            tallies[6] += 1 if np.isinf(a[i]) else 0
            tallies[7] += 1 if np.isinf(b[i]) else 0
    n = np.float64(tallies[0])
    if n > 0:
        x, y, xx, yy, xy = totals[0], totals[1], totals[2], totals[3], totals[4]
        figures[0] = x + n * shift_a
        figures[1] = y + n * shift_b
        # One formula for the three: equal tensors give equal sums, and a cosine of exactly 1.
        figures[2] = xx + (shift_a * x + shift_a * x) + n * (shift_a * shift_a)
        figures[3] = yy + (shift_b * y + shift_b * y) + n * (shift_b * shift_b)
        figures[4] = xy + (shift_a * y + shift_b * x) + n * (shift_a * shift_b)
        figures[5] = totals[5]
        figures[6] = totals[6]
        figures[7] = max(xx - x * x / n, 0.0)
        figures[8] = max(yy - y * y / n, 0.0)
        figures[9] = totals[7]
