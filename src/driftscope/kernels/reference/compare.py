"""Compare two arrays of values in plain NumPy, and the error that a format is expected to leave."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.kernels.formats import format_of
from driftscope.kernels.reference.dequantize import unpack

_LEVELS = {
    "IQ4_NL": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    "MXFP4": (-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12),
}
_LEVELS["IQ4_XS"] = _LEVELS["IQ4_NL"]


def canonical(
    stored: NDArray[np.float32], rows: NDArray[np.int64] | None = None, *, transposed: bool = False
) -> NDArray[np.float32]:
    """The values of a tensor in canonical order.

    Args:
        stored: values of the stored rows.
        rows: stored row of each canonical row, or of each canonical column if transposed.
        transposed: stored rows are canonical columns.
    """
    ordered = stored if rows is None else stored[rows]
    return np.ascontiguousarray(ordered.T if transposed else ordered)


def compare(a: NDArray[np.float32], b: NDArray[np.float32]) -> dict[str, Any]:
    """The fields of `driftscope.kernels.compare.TensorComparison`, but for the expected energy."""
    both = (np.isfinite(a) & np.isfinite(b)).reshape(-1)
    x, y = a.reshape(-1)[both].astype(np.float64), b.reshape(-1)[both].astype(np.float64)
    d = np.abs(x - y)
    worst = int(np.argmax(d)) if len(d) else -1
    return {
        "element_count": a.size,
        "compared_count": len(d),
        "identical_count": np.count_nonzero(x == y),
        "small_count": np.count_nonzero((d > 0) & (d < 1e-3)),
        "medium_count": np.count_nonzero((d >= 1e-3) & (d < 1e-2)),
        "large_count": np.count_nonzero(d >= 1e-2),
        "nan_a": np.count_nonzero(np.isnan(a)),
        "nan_b": np.count_nonzero(np.isnan(b)),
        "inf_a": np.count_nonzero(np.isinf(a)),
        "inf_b": np.count_nonzero(np.isinf(b)),
        "bit_identical": a.tobytes() == b.tobytes(),
        "sum_a": x.sum(),
        "sum_b": y.sum(),
        "sum_aa": (x * x).sum(),
        "sum_bb": (y * y).sum(),
        "sum_ab": (x * y).sum(),
        "sum_abs": d.sum(),
        "sum_dd": (d * d).sum(),
        "centred_aa": x.var() * x.size if len(d) else 0.0,
        "centred_bb": y.var() * y.size if len(d) else 0.0,
        "max_diff": d.max() if len(d) else np.nan,
        "max_index": np.flatnonzero(both)[worst] if len(d) else -1,
        "max_value_a": x[worst] if len(d) else np.nan,
        "max_value_b": y[worst] if len(d) else np.nan,
    }


def expected_energy(raw: NDArray[np.uint8], dtype: str) -> float | None:
    """What rounding to `dtype` is expected to leave of the sum of squared differences."""
    if dtype in ("F16", "BF16"):
        if dtype == "F16":
            values, smallest, bits = raw.reshape(-1).view("<f2").astype(np.float64), -14, 10
        else:
            words = raw.reshape(-1).view("<u2").astype(np.uint32) << 16
            values, smallest, bits = words.view(np.float32).astype(np.float64), -126, 7
        values = values[np.isfinite(values)]
        with np.errstate(divide="ignore"):
            exponent = np.maximum(np.floor(np.log2(np.abs(values))), smallest)
        return float(np.sum(np.exp2(2 * (exponent - bits))) / 12)
    if not format_of(dtype).is_integer:
        return None
    quants, scales, _, d, _ = unpack(raw, dtype)
    step = (d.astype(np.float64) * scales)[:, :, None]
    cells = np.full(quants.shape, 1 / 12).reshape(*scales.shape, -1)
    if dtype in _LEVELS:
        levels = np.array(_LEVELS[dtype], np.float64)
        edges = (levels[1:] + levels[:-1]) / 2
        low = np.concatenate([[2 * levels[0] - edges[0]], edges])
        high = np.concatenate([edges, [2 * levels[-1] - edges[-1]]])
        mean_square = ((high - levels) ** 3 - (low - levels) ** 3) / 3 / (high - low)
        cells = mean_square[np.searchsorted(levels, quants)].reshape(*scales.shape, -1)
    energies = (step**2 * cells).sum(axis=2)
    return float(energies[np.isfinite(energies)].sum())
