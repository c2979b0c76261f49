"""Rows of stored tensors as canonical values, for what looks at a tensor more closely than the sweep does."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.tensor import TensorRef
from driftscope.kernels.dequantize import dequantize

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
Rows = NDArray[np.int64]

SLAB_VALUES = 1 << 20
"""Values that are decoded at a time, about: 4 MiB as f32."""

_SEED = 6


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor; a vector is one column, so that its values are rows."""
    if len(shape) == 1:
        return shape[0], 1
    columns = shape[-1]
    rows = 1
    for dim in shape[:-1]:
        rows *= dim
    return rows, columns


def rows_of(ref: TensorRef, rows: Rows | None = None) -> F32:
    """Canonical rows of a tensor.

    Args:
        ref: the tensor.
        rows: ``int64[n]``, canonical numbers of the rows, or None for all.

    Returns:
        ``float32[n, columns]``: what the container adds to each value is taken off again. A vector has a
        column for each value where `rows` is None, and else a row, see `matrix_shape`.
    """
    raw, order = ref.raw(), ref.row_order()
    if len(ref.shape) == 1 and rows is not None:
        values = dequantize(raw, ref.dtype).reshape(-1, 1)[rows]
    else:
        stored = order if rows is None else rows if order is None else order[rows]
        values = dequantize(raw if stored is None else raw[stored], ref.dtype)
    return values - np.float32(ref.value_offset) if ref.value_offset else values


def sampled_rows(n_rows: int, count: int) -> Rows:
    """Some rows, ``int64[min(count, n_rows)]`` ascending: the same ones for every tensor of so many rows.

    They are drawn, not spaced evenly: evenly spaced rows can be just those that a permutation leaves alone.
    """
    random = np.random.Generator(np.random.Philox([_SEED, n_rows]))
    return np.sort(random.permutation(n_rows)[:count])


def slabs(a: TensorRef, b: TensorRef) -> Iterator[tuple[U8, U8]]:
    """The bytes of two tensors of one shape, the same canonical rows of both at a time.

    Each tensor is read once: reading one that is decoded as it is read takes time and memory.

    Yields:
        ``uint8[rows, row_bytes]`` of a and of b, of about `SLAB_VALUES` values.
    """
    (raw_a, order_a), (raw_b, order_b) = ((ref.raw(), ref.row_order()) for ref in (a, b))
    step = max(1, SLAB_VALUES // max(1, a.shape[-1]))
    for first in range(0, a.n_rows, step):
        rows = slice(first, first + step)
        yield (
            raw_a[rows] if order_a is None else raw_a[order_a[rows]],
            raw_b[rows] if order_b is None else raw_b[order_b[rows]],
        )
