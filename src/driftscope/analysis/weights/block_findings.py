"""Blocks and rows of a tensor that are off by more than the rest of it: what a whole-tensor error hides.

A block is found where the error energy of one of its cells of 32 values, or its largest error, is further
out than what the tail of the tensor's own cells leads to expect, at a false-alarm rate of `ALPHA` a tensor
and statistic; and never where it is within what rounding alone may do. A row is found likewise by its mean
difference and by its gain. What is found is then explained: by one flipped bit, a scale, a constant.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.analysis.finite import finite
from driftscope.analysis.weights.block_faults import Block, Bounds, explain
from driftscope.artifacts.tensor import TensorRef
from driftscope.kernels.block_errors import BlockErrors, compare_blocks
from driftscope.kernels.compare import TensorComparison
from driftscope.kernels.compare_cells import CELL, CodeScale, by_exponent, has_steps, scale_rounding
from driftscope.kernels.dequantize import dequantize
from driftscope.kernels.formats import BlockFormat, format_of

ALPHA = 1e-6
"""False alarms that the model of the tail expects of a clean tensor, for each statistic."""

LIMIT = 8
"""Findings of a tensor that are listed."""

# Fewer rows than these say nothing about the tail of a row's statistic.
_FEWEST_ROWS = 48

# A tail is the outermost part of this size, and of at least so many.
_TAIL, _FEWEST_IN_TAIL = 0.005, 200

# Energy and largest error that rounding may leave. Quantizers clip by a step and more to fit the rest better;
# an error of two steps is at least one and a half.
_LARGEST_ENERGY, _LARGEST_PEAK = 3.0, 2.0
_LARGEST_PEAK_OF_ROUNDING = 0.25

# Most blocks that are looked at, to list the worst ones.
_CANDIDATES = 64

Row = NDArray[np.float32]


@dataclass(frozen=True)
class BlockFinding:
    """A part of a tensor that is off.

    Attributes:
        tensor: its name.
        kind: ``flipped-bit``, ``non-finite-scale``, ``non-finite``, ``zero-scale``, ``saturated-scale``,
            ``quants-at-rail`` or ``outlying-error`` for blocks, ``row-offset`` or ``row-scaled`` for rows.
        row: canonical row.
        columns: first and end column.
        statement: one sentence with figures.
        evidence: the figures.
    """

    tensor: str
    kind: str
    row: int
    columns: tuple[int, int]
    statement: str
    evidence: dict[str, Any]


@dataclass(frozen=True)
class BlockFindings:
    """What was found in one tensor.

    Attributes:
        tensor: its name.
        findings: the worst ones, rows first.
        block_count: blocks that were judged.
        outlying_blocks: blocks that are off, those in rows that are off left out.
        outlying_rows: rows that are off; of more than 64 the worst 64 are looked at.
        alpha: false-alarm rate of each statistic.
        energy_bound: error energy over what the steps predict, above which a cell is outlying; infinite where
            the tensor's own tail reaches as far as was looked.
        peak_bound: likewise of the largest squared error, in squared steps.
    """

    tensor: str
    findings: tuple[BlockFinding, ...]
    block_count: int
    outlying_blocks: int
    outlying_rows: int
    alpha: float
    energy_bound: float
    peak_bound: float

    def to_dict(self) -> dict[str, Any]:
        """As a document; figures that are not finite are null."""
        found = asdict(self)
        found["findings"] = [{**item, "columns": list(item["columns"])} for item in found["findings"]]
        plain: dict[str, Any] = finite(found)
        return plain


def compare_with_findings(
    a: TensorRef, b: TensorRef, *, tensor: str | None = None, threads: int = 1, limit: int = LIMIT
) -> tuple[TensorComparison, BlockFindings]:
    """Compare two stored tensors of one shape, in one pass, and look for blocks and rows that are off."""
    compared, errors = compare_blocks(
        *(a.raw(), a.dtype, b.raw(), b.dtype),
        rows_a=a.row_order(),
        rows_b=b.row_order(),
        threads=threads,
    )
    return compared, findings(a, b, errors, tensor=tensor, limit=limit)


def findings(
    a: TensorRef,
    b: TensorRef,
    errors: BlockErrors,
    *,
    tensor: str | None = None,
    limit: int = LIMIT,
    alpha: float = ALPHA,
) -> BlockFindings:
    """Judge the errors of b against a, and explain the worst.

    Args:
        a: the teacher's tensor.
        b: the candidate's tensor; where the steps of its format are not known, nothing is found.
        errors: of `compare_blocks` of the two.
        tensor: name of the findings; a's by default.
        limit: findings to list.
        alpha: false alarms to expect of each statistic.
    """
    name = tensor or a.name
    layout = format_of(b.dtype)
    width = max(CELL, layout.block_size)
    block_count = errors.n_rows * -(-errors.columns // width)
    if not has_steps(layout):
        return BlockFindings(name, (), block_count, 0, 0, alpha, math.inf, math.inf)
    bounds = _bounds(errors, alpha, rounding=by_exponent(layout))
    reader = _Reader(a, b)
    in_rows = []
    for row in _outlying_rows(errors, alpha, layout)[:_CANDIDATES]:
        found = _of_row(name, row, errors, *reader.row(row))
        if found is not None:
            in_rows.append(found)
    listed = in_rows[:limit]
    off = np.array(sorted(found.row for found in in_rows), np.int64)
    rows, blocks, worst = _outlying_blocks(errors, bounds, width // CELL, off)
    order = np.lexsort((blocks, rows, -worst))[:_CANDIDATES]
    for row, first, end in _runs(rows[order], blocks[order])[: max(0, limit - len(listed))]:
        columns = (first * width, min(end * width, errors.columns))
        listed.append(_of_blocks(name, reader.block(row, first, end, width), row, columns, bounds))
    return BlockFindings(
        tensor=name,
        findings=tuple(listed),
        block_count=block_count,
        outlying_blocks=len(rows),
        outlying_rows=len(in_rows),
        alpha=alpha,
        energy_bound=bounds.energy,
        peak_bound=bounds.peak,
    )


def tail_bound(counts: NDArray[np.int64], alpha: float) -> float:
    """The code above which `alpha` values are expected, from the tail of the values themselves.

    The tail is the outermost two-hundredth. The logarithm of a ratio is taken to fall off there exponentially
    (the ratio itself: as a power law), with the median of the excess as its half-life. That is heavier than
    what rounding leaves, and up to half of the tail may be faults.

    Args:
        counts: ``int64[256]``, values with each code.
        alpha: values expected above the bound.
    """
    above = counts[::-1].cumsum()[::-1]
    least = min(max(_FEWEST_IN_TAIL, _TAIL * above[0]), above[0] / 4)
    start = int(np.flatnonzero(above >= least)[-1])
    # Codes within which half of the tail lies, part of the last one in proportion.
    missing, half = above[start] / 2, 0.0
    for code in range(start, 256):
        if counts[code] >= missing:
            half = code - start + missing / counts[code]
            break
        missing -= counts[code]
    return start + half / math.log(2) * math.log(max(1.0, above[start] / alpha))


def _bounds(errors: BlockErrors, alpha: float, *, rounding: bool) -> Bounds:
    """Bounds on the ratios of a cell: codes from there on are outlying."""
    codes = []
    floors = (_LARGEST_ENERGY, _LARGEST_PEAK_OF_ROUNDING if rounding else _LARGEST_PEAK)
    for counts, floor in zip((errors.energy_counts, errors.peak_counts), floors, strict=True):
        least = int(errors.scale.code(floor)) + 1
        beyond = int(counts[least:].sum())
        # Where nearly every cell keeps to what rounding may do, b is the rounding of a, and all cells must.
        exact = rounding and beyond * 1000 < counts.sum()
        codes.append(least if exact else max(least, math.ceil(tail_bound(counts, alpha))))
    return Bounds(*codes, *(_ratio(errors.scale, code) for code in codes))


def _ratio(scale: CodeScale, code: int) -> float:
    return scale.ratio(code) if code <= 255 else math.inf


def _outlying_blocks(
    errors: BlockErrors, bounds: Bounds, cells: int, but_for: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Row and number of every outlying block, and by how many codes it is beyond a bound."""
    found = []
    pairs = (
        (errors.energy, errors.energy_counts, bounds.energy_code),
        (errors.peak, errors.peak_counts, bounds.peak_code),
    )
    for codes, counts, bound in pairs:
        # Values that are not finite always are.
        bound = min(bound, 255) if counts[255] * 1000 < counts.sum() else bound
        if counts[bound:].sum():
            at = np.flatnonzero(codes.reshape(-1) >= bound)
            row, cell = np.divmod(at, codes.shape[1])
            found.append(np.stack([row, cell // cells, codes.reshape(-1)[at].astype(np.int64) - bound]))
    if not found:
        none = np.zeros(0, np.int64)
        return none, none, none
    row, block, beyond = np.concatenate(found, axis=1)
    kept = ~np.isin(row, but_for)
    row, block, beyond = row[kept], block[kept], beyond[kept]
    order = np.lexsort((-beyond, block, row))
    row, block, beyond = row[order], block[order], beyond[order]
    first = np.ones(len(row), np.bool_)
    first[1:] = (np.diff(row) != 0) | (np.diff(block) != 0)
    return row[first], block[first], beyond[first]


def _runs(rows: NDArray[np.int64], blocks: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Row, first and end of the runs of neighbouring blocks, in the order of the worst of each."""
    waiting = {(int(row), int(block)): None for row, block in zip(rows, blocks, strict=True)}
    found = []
    while waiting:
        row, block = next(iter(waiting))
        first, end = block, block
        while (row, first - 1) in waiting:
            first -= 1
        while (row, end) in waiting:
            end += 1
        for at in range(first, end):
            waiting.pop((row, at), None)
        found.append((row, first, end))
    return found


def _outlying_rows(errors: BlockErrors, alpha: float, layout: BlockFormat) -> list[int]:
    """Rows whose mean difference or gain is outlying, worst first."""
    if errors.n_rows < _FEWEST_ROWS or errors.columns < CELL:
        return []
    sum_a, sum_b, aa, bb, dd = errors.by_row.T
    mean = (sum_b - sum_a) / errors.columns
    with np.errstate(all="ignore"):
        # The sum of a (b - a).
        ad = (bb - aa - dd) / 2
        offset = mean * errors.columns / np.sqrt(np.maximum(dd - errors.columns * mean * mean, 0.0))
        gain = ad / np.sqrt(aa * np.maximum(dd - ad * ad / aa, 0.0) / errors.columns)
        plain = [mean != 0, np.abs(ad) > 1e-12 * (aa + bb)]
    if layout.is_integer:
        # Where a row is so small that its scales underflow, its errors have no zero mean.
        plain = [meant & (dd > 4 * errors.columns * scale_rounding(layout).fixed) for meant in plain]
    beyond: dict[int, float] = {}
    for statistic, meant in zip((offset, gain), plain, strict=True):
        values = np.where(meant & ~np.isnan(statistic), statistic, 0.0)
        for row, by in _beyond_tail(values, alpha):
            beyond[row] = max(by, beyond.get(row, 0.0))
    return sorted(beyond, key=lambda row: (-beyond[row], row))


def _beyond_tail(values: NDArray[np.float64], alpha: float) -> list[tuple[int, float]]:
    """Values that are further from the median than the tail of the distances leads to expect."""
    distance = np.abs(values - np.median(values))
    order = np.sort(distance)
    in_tail = max(len(values) // 20, min(24, len(values) // 2))
    start = order[-in_tail]
    half = float(np.median(order[-in_tail:])) - start
    bound = start + half / math.log(2) * math.log(in_tail / alpha)
    # No less than what independent errors of equal size would reach.
    bound = max(bound, math.sqrt(2 * math.log(2 * len(values) / alpha)))
    return [(int(row), float(distance[row] / bound)) for row in np.flatnonzero(distance > bound)]


def _of_row(name: str, row: int, errors: BlockErrors, a: Row, b: Row) -> BlockFinding | None:
    """Which of a constant and a factor explains a row better; None where a part of it causes it."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    both = np.isfinite(x) & np.isfinite(y)
    x, y = x[both], y[both]
    d = y - x
    energy = float((d * d).sum())
    mean = float(d.mean())
    factor = float((x * y).sum() / (x * x).sum()) if x.any() else 1.0
    left = {
        "row-offset": float(((d - mean) ** 2).sum()),
        "row-scaled": float(((y - factor * x) ** 2).sum()),
    }
    kind = min(left, key=lambda key: left[key])
    if not _all_along(kind, x, d):
        return None
    sum_a, sum_b, aa, bb, dd = errors.by_row.T
    evidence = {
        "mean_difference": mean,
        "factor": factor,
        "energy": energy,
        "energy_left": left[kind],
        "median_energy_of_rows": float(np.median(dd)),
    }
    if kind == "row-offset":
        others = np.median(np.abs(sum_b - sum_a)) / errors.columns
        said = f"b is a plus {mean:.3g} on average, where rows of this tensor are within {others:.1g}"
    else:
        with np.errstate(all="ignore"):
            others = float(np.nanmedian(np.abs((bb - aa - dd) / 2 / aa)))
        said = f"b is a times {factor:.4g}, where rows of this tensor are within {others:.1g} of 1"
    statement = (
        f"row {row}: {said}; without that its error energy is {left[kind]:.3g} instead of {energy:.3g} "
        f"(median of the rows: {evidence['median_energy_of_rows']:.3g})"
    )
    return BlockFinding(name, kind, row, (0, errors.columns), statement, evidence)


def _all_along(kind: str, x: NDArray[np.float64], d: NDArray[np.float64]) -> bool:
    """Whether the effect is at least half as large in most parts of the row."""
    parts = len(d) // CELL
    x, d = (side[: parts * CELL].reshape(parts, CELL) for side in (x, d))
    if kind == "row-offset":
        effects = d.mean(axis=1)
        whole = d.mean()
    else:
        with np.errstate(all="ignore"):
            effects = np.nan_to_num((x * d).sum(axis=1) / (x * x).sum(axis=1))
        whole = (x * d).sum() / (x * x).sum()
    return bool(np.median(effects) * np.sign(whole) > 0.5 * abs(whole))


def _of_blocks(name: str, block: Block, row: int, columns: tuple[int, int], bounds: Bounds) -> BlockFinding:
    kind, said, evidence = explain(block, bounds)
    where = f"row {row}, columns {columns[0]} to {columns[1] - 1}"
    return BlockFinding(name, kind, row, columns, f"{where}: {said}", evidence)


class _Reader:
    """Rows and blocks of both tensors, in canonical order."""

    def __init__(self, a: TensorRef, b: TensorRef) -> None:
        self._a, self._b = a, b
        self._orders = a.row_order(), b.row_order()
        self._bytes: dict[int, NDArray[np.uint8]] = {}

    def row(self, row: int) -> tuple[Row, Row]:
        with np.errstate(all="ignore"):
            a, b = (
                dequantize(self._raw(side)[self._stored(side, row)][None], ref.dtype)[0]
                for side, ref in enumerate((self._a, self._b))
            )
        return a, b

    def block(self, row: int, first: int, end: int, width: int) -> Block:
        layout = format_of(self._b.dtype)
        each = width // layout.block_size * layout.block_bytes
        stored_row = self._stored(1, row)
        raw = self._raw(1)
        stored = raw[stored_row, first * each : end * each]
        plain = type(self._b) is TensorRef
        at = self._b.offset + stored_row * raw.shape[1] + first * each if plain else None
        a, _ = self.row(row)
        return Block(a[first * width : end * width], np.array(stored), self._b.dtype, end - first, at)

    def _raw(self, side: int) -> NDArray[np.uint8]:
        if side not in self._bytes:
            self._bytes[side] = (self._a, self._b)[side].raw()
        return self._bytes[side]

    def _stored(self, side: int, row: int) -> int:
        order = self._orders[side]
        return row if order is None else int(order[row])
