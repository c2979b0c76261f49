"""One tensor of the teacher (a) against the candidate's (b), measured in one pass: a row of the sweep.

What a row means is said elsewhere: `driftscope.analysis.weights.relations` names what each tensor of b is
to a's.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.analysis.weights.outside_cells import outside_cells
from driftscope.analysis.weights.pairs import undone
from driftscope.analysis.weights.rounded_copy import is_coarser, is_float, is_rounded_copy
from driftscope.analysis.weights.tensor_rows import slabs
from driftscope.analysis.weights.usual_error import usual_nmse
from driftscope.artifacts.tensor import TensorRef
from driftscope.kernels.compare import TensorComparison, merge
from driftscope.kernels.dequantize import dequantize
from driftscope.kernels.device import Kernels, kernels_on
from driftscope.kernels.formats import decoder_of

_STATUS_BELOW = (
    (1e-3, "NearlyIdentical"),
    (1e-2, "SmallDiff"),
    (1e-1, "MediumDiff"),
    (1.0, "LargeDiff"),
    (math.inf, "Critical"),
)

# Nearest rounding leaves about the energy that its cells predict; what is far from it is no rounded copy, and
# is not read a second time.
_ROUNDED_BELOW = 4.0

# Bytes of each side that are compared at a time.
_CHUNK = 1 << 22


def compare_tensor(
    a: TensorRef, b: TensorRef, *, tensor: str | None = None, kernels: Kernels | None = None
) -> dict[str, Any]:
    """Compare two stored tensors, rows in canonical order.

    Where one container adds a constant to the values and the other does not (GGUF's gemma norms are stored
    plus one), the values are compared as the one with the larger constant stores them: so that a sum that
    was rounded to f32 once is compared with the same sum.

    Args:
        a: the teacher's tensor.
        b: the candidate's tensor.
        tensor: name of the row; a's by default.
        kernels: where to compare; by default on the CPU with one thread.

    Returns:
        A row of the ``sweep`` table. Tensors of unlike shapes are not compared: the status says so.
    """
    name = tensor or a.name
    row: dict[str, Any] = {
        "tensor": name,
        "shape_a": _shape(a.shape),
        "shape_b": _shape(b.shape),
        "dtype_a": a.stored_dtype,
        "dtype_b": b.stored_dtype,
        "decoder_a": decoder_of(a.dtype),
        "decoder_b": decoder_of(b.dtype),
        "transforms_a": ",".join(undone(name, a)),
        "transforms_b": ",".join(undone(name, b)),
        "element_count": a.n_elements,
    }
    if a.shape != b.shape:
        status = "Transposed" if a.shape == b.shape[::-1] else "ShapeMismatch"
        return {**row, **_NOTHING_COMPARED, "status": status}
    if not a.n_elements:
        return {**row, **_NOTHING_COMPARED, "status": "NotCompared"}
    found = _compare(a, b, kernels or kernels_on("cpu"))
    any_compared = found.compared_count > 0
    r, c = divmod(found.max_index, a.shape[-1])
    non_finite = found.element_count - found.compared_count
    coarse = is_coarser(a.stored_dtype, b.stored_dtype) and not found.bit_identical
    # Cells say nothing about values that are off by steps of their own.
    of_a_block = coarse and not is_float(a.dtype)
    outside, in_sample = (0, 0) if found.bit_identical or of_a_block else outside_cells(a, b)
    bit_identical = found.bit_identical and _equal_beyond_f32(a, b)
    return {
        **row,
        "compared_count": found.compared_count,
        "mean_diff": found.mean_diff,
        "max_diff": found.max_diff if any_compared else None,
        "max_index": f"{r},{c}" if any_compared else None,
        "max_value_a": found.max_value_a if any_compared else None,
        "max_value_b": found.max_value_b if any_compared else None,
        "rmse": found.rmse,
        "nmse": found.nmse,
        "relative_l2": found.relative_l2,
        "cosine_similarity": found.cosine_similarity,
        "scale": found.sum_ab / found.sum_aa if found.sum_aa > 0 else None,
        "mean_error": (found.sum_b - found.sum_a) / found.compared_count if any_compared else None,
        "std_a": found.std_a,
        "std_b": found.std_b,
        "std_ratio": found.std_ratio,
        "identical_count": found.identical_count,
        "small_count": found.small_count,
        "medium_count": found.medium_count,
        "large_count": found.large_count,
        "nan_a": found.nan_a,
        "nan_b": found.nan_b,
        "inf_a": found.inf_a,
        "inf_b": found.inf_b,
        "bit_identical": bit_identical,
        "same_bytes": bit_identical and _same_bytes(a, b),
        "rounded_copy": not bit_identical and _is_rounded(a, b, found),
        "expected_nmse": _sum(_expected(b, found), _expected_of_a(a, b, found, kernels) if coarse else None),
        "outside_count": outside,
        "cell_count": in_sample,
        "status": published_status(found.max_diff, found.compared_count, non_finite),
    }


def _expected(b: TensorRef, found: TensorComparison) -> float | None:
    return usual_nmse(b) if found.expected_nmse is None else found.expected_nmse


def _expected_of_a(
    a: TensorRef, b: TensorRef, found: TensorComparison, kernels: Kernels | None
) -> float | None:
    """What a's own format leaves, where a is the rounder of the two; in parts of the energy of a."""
    if a.value_offset != b.value_offset or found.sum_aa <= 0:
        return None
    back = _compare(b, a, getattr(kernels, "unwatched", kernels) or kernels_on("cpu"))
    energy = back.expected_energy
    return usual_nmse(a) if energy is None else energy / found.sum_aa


def _sum(one: float | None, other: float | None) -> float | None:
    return one if other is None else other if one is None else one + other


def published_status(max_diff: float, compared_count: int, non_finite_count: int) -> str:
    """The published class of a tensor by its largest difference, with two cases that it passed over.

    Args:
        max_diff: largest |a - b| over the compared pairs.
        compared_count: pairs with both values finite.
        non_finite_count: pairs with a value that is NaN or infinite; the published sweep ignored them.

    Returns:
        ``NotCompared`` and ``NonFinite`` first; then ``Identical`` at 0, ``NearlyIdentical`` below 1e-3,
        ``SmallDiff`` below 1e-2, ``MediumDiff`` below 0.1, ``LargeDiff`` below 1, else ``Critical``.
    """
    if non_finite_count:
        return "NonFinite"
    if not compared_count:
        return "NotCompared"
    if max_diff == 0:
        return "Identical"
    return next(status for bound, status in _STATUS_BELOW if max_diff < bound)


_NOTHING_COMPARED: dict[str, Any] = {
    "compared_count": 0,
    **dict.fromkeys(("mean_diff", "max_diff", "max_index", "max_value_a", "max_value_b", "rmse", "nmse")),
    **dict.fromkeys(
        ("relative_l2", "cosine_similarity", "scale", "mean_error", "std_a", "std_b", "std_ratio")
    ),
    **dict.fromkeys(("identical_count", "small_count", "medium_count", "large_count"), 0),
    **dict.fromkeys(("nan_a", "nan_b", "inf_a", "inf_b"), 0),
    **dict.fromkeys(("bit_identical", "same_bytes", "rounded_copy"), False),
    "expected_nmse": None,
    **dict.fromkeys(("outside_count", "cell_count"), 0),
}


def _compare(a: TensorRef, b: TensorRef, kernels: Kernels) -> TensorComparison:
    if a.value_offset == b.value_offset:
        return kernels.compare(a.raw(), a.dtype, b.raw(), b.dtype, rows_a=a.row_order(), rows_b=b.row_order())
    level = max(a.value_offset, b.value_offset)
    return merge([kernels.compare(*_raised(a, level, x), *_raised(b, level, y)) for x, y in slabs(a, b)])


def _raised(ref: TensorRef, level: float, stored: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], str]:
    """Rows with as much added to each value as `level` says, and their format."""
    if ref.value_offset == level:
        return stored, ref.dtype
    values = dequantize(stored, ref.dtype) + np.float32(level - ref.value_offset)
    return values.view(np.uint8), "F32"


def _equal_beyond_f32(a: TensorRef, b: TensorRef) -> bool:
    """Whether values that are equal as f32 are equal: only F64 holds others."""
    if "F64" not in (a.dtype, b.dtype):
        return True
    return all(np.array_equal(_in_f64(x, a.dtype), _in_f64(y, b.dtype)) for x, y in slabs(a, b))


def _in_f64(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.float64]:
    if dtype == "F64":
        return np.ascontiguousarray(raw).view(np.float64)
    return dequantize(raw, dtype).astype(np.float64)


def _same_bytes(a: TensorRef, b: TensorRef) -> bool:
    """Whether two tensors of equal values are stored alike, byte for byte."""
    if a.stored_dtype != b.stored_dtype or a.rope_heads != b.rope_heads or a.value_offset != b.value_offset:
        return False
    if a.stored_dtype != a.dtype:
        return np.array_equal(a.stored_bytes(), b.stored_bytes())
    # Each value of a float format has one encoding; blocks of integers can write the same value in several.
    if is_float(a.dtype):
        return True
    x, y = a.raw(), b.raw()
    step = max(1, _CHUNK // max(1, x.shape[1]))
    return all(
        np.array_equal(x[first : first + step], y[first : first + step]) for first in range(0, len(x), step)
    )


def _is_rounded(a: TensorRef, b: TensorRef, found: TensorComparison) -> bool:
    if b.stored_dtype in (a.stored_dtype, "F64") or b.stored_dtype != b.dtype or not is_float(b.dtype):
        return False
    if found.compared_count != found.element_count:
        return False
    expected = found.expected_energy
    if expected is not None and found.sum_dd > _ROUNDED_BELOW * expected:
        return False
    return is_rounded_copy(a, b)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(str(dim) for dim in shape)
