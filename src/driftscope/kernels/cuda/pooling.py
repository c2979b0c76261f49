"""What is left of a comparison once the card has seen every value: slabs are added up, on the host."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from driftscope.kernels.compare import TensorComparison
from driftscope.kernels.expected_error import EVEN, EXPONENT, cell_energies, cell_kind
from driftscope.kernels.formats import BlockFormat

# Bits of the significand, and the smallest exponent of a normal value, biased as in f32.
_FLOATS = {"F16": (10, 113), "BF16": (7, 1)}


def cells_of(layout: BlockFormat) -> NDArray[np.float64]:
    """The mean square error inside the cell of a value of a format, ``float64[256]``.

    Indexed by ``quant + 128``, in units of the sub-block's squared scale, for integer formats; by the biased
    exponent of f32 for F16 and BF16. See `driftscope.kernels.expected_error`.
    """
    kind = cell_kind(layout)
    if kind == EVEN:
        return np.full(256, 1.0 / 12.0)
    if kind == EXPONENT:
        bits, smallest = _FLOATS[layout.name]
        energies = np.ldexp(1.0, 2 * (np.maximum(np.arange(256), smallest) - 127 - bits)) / 12.0
        energies[255] = 0.0  # infinities and NaNs
        return energies
    return cell_energies(layout)


def largest_of(x: NDArray[np.float32], y: NDArray[np.float32], start: int) -> tuple[int, float, float]:
    """Flat index and values of the first pair with the largest difference; ``x[0]`` is value `start`."""
    both = np.isfinite(x) & np.isfinite(y)
    wide = (np.where(both, values, np.float32(0)).astype(np.float64) for values in (x, y))
    i = int(np.argmax(np.where(both, np.abs(np.subtract(*wide)), -1.0)))
    return start + i, float(x[i]), float(y[i])


def pooled(
    figures: NDArray[np.float64],
    tallies: NDArray[np.int64],
    element_count: int,
    largest: tuple[int, float, float],
    *,
    with_energy: bool,
) -> TensorComparison:
    """Add up slabs; centred sums by the parallel-axis theorem (Chan, Golub and LeVeque 1983).

    Args:
        figures: ``float64[slabs, 11]`` as ``compare.cu`` writes them.
        tallies: ``int64[slabs, 9]`` likewise.
        element_count: pairs of values in all.
        largest: flat index and values of the pair with the largest difference.
        with_energy: whether the format of b has an expected energy.
    """
    sums = [math.fsum(column) for column in figures.T.tolist()]
    compared, identical, below_small, below_medium, nan_a, nan_b, inf_a, inf_b, differ = tallies.sum(
        axis=0
    ).tolist()
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
        nan_a=nan_a,
        nan_b=nan_b,
        inf_a=inf_a,
        inf_b=inf_b,
        bit_identical=differ == 0,
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
        expected_energy=sums[10] if with_energy else None,
    )
