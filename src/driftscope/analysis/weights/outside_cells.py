"""How many values lie outside of the cell that they would be rounded to: the sharpest test of a quantization.

Quantizers search for scales, but in the end round each value to the nearest level of the scales that they
store. A value of a is then in the cell of its level in b, half a step to either side. Where b was quantized
from other values, some are not, long before the mean error shows it: values that are off by a normal error of
t steps lie outside at about 0.8 t, while the mean square error grows by only 12 t^2 parts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from driftscope.analysis.weights.tensor_rows import rows_of, sampled_rows
from driftscope.artifacts.tensor import TensorRef
from driftscope.kernels.block_decoders import E2M1_DOUBLED, IQ4_LEVELS
from driftscope.kernels.dequantize import dequantize
from driftscope.kernels.expected_error import EVEN, LEVELS, cell_kind
from driftscope.kernels.formats import format_of
from driftscope.kernels.unpack import UnpackedRows, check_raw

F64 = NDArray[np.float64]

SAMPLED_VALUES = 1 << 13
"""Values of a tensor that are looked at, about."""

# Some quantizers round the scales after the quants were chosen: their cells are wider by so much.
_WIDER = 1.05

# Largest rounding error of a value of a float format, as a part of the value.
_HALF_ULP = {"F16": 2.0**-11, "BF16": 2.0**-8}


def outside_cells(a: TensorRef, b: TensorRef) -> tuple[int, int]:
    """Values of a outside of the cell of b's quant, in a sample of rows.

    Values at the first or the last level of the format are left out: what is clipped is rightly outside.

    Returns:
        How many of the sample are outside, and how many were looked at; both 0 where b's format has no cells.
    """
    layout = format_of(b.dtype)
    if cell_kind(layout) not in (EVEN, LEVELS) or a.shape != b.shape or not a.n_elements:
        return 0, 0
    rows = sampled_rows(a.n_rows, max(2, SAMPLED_VALUES // a.shape[-1]))
    order = b.row_order()
    raw, columns = check_raw(b.raw()[rows if order is None else order[rows]], b.dtype)
    unpacked = UnpackedRows.empty(layout, len(rows), columns)
    unpacked.fill(raw, 0, len(rows))
    values = dequantize(raw, b.dtype).astype(np.float64)
    repeat = columns // unpacked.scales.shape[1]
    scale = np.repeat(
        np.repeat(unpacked.d.astype(np.float64), layout.block_size // layout.sub_block, axis=1)
        * unpacked.scales,
        repeat,
        axis=1,
    )
    quants = unpacked.quants.astype(np.int64)
    below, above, inner = _cells(layout.name, cell_kind(layout), quants)
    # In units of the step, in the direction of larger quants.
    step = np.where(scale == 0, 1.0, scale)
    exact = rows_of(a, rows).astype(np.float64)
    off = (exact - values) / step
    # Where a was rounded itself, b may have been made of what it was rounded from.
    slack = np.abs(exact / step) * _HALF_ULP.get(a.stored_dtype, 0.0)
    counted = inner & (scale != 0) & np.isfinite(off)
    outside = counted & ((off > _WIDER * above + slack) | (off < -_WIDER * below - slack))
    return int(outside.sum()), int(counted.sum())


def _cells(name: str, kind: int, quants: NDArray[np.int64]) -> tuple[F64, F64, NDArray[np.bool_]]:
    """Width of each value's cell below and above its level, and whether it is an inner one."""
    if kind == LEVELS:
        levels = np.unique(E2M1_DOUBLED if name == "MXFP4" else IQ4_LEVELS).astype(np.int64)
        gaps = np.diff(levels).astype(np.float64) / 2
        at = np.searchsorted(levels, quants)
        below, above = np.concatenate([gaps[:1], gaps])[at], np.concatenate([gaps, gaps[-1:]])[at]
        return below, above, (at > 0) & (at < len(levels) - 1)
    half = np.full(quants.shape, 0.5)
    return half, half, (quants > quants.min()) & (quants < quants.max())
