"""The values of a stored tensor, slab by slab, in canonical row order."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.tensor import TensorRef
from driftscope.kernels.dequantize import dequantize

# Values of one slab: 64 MiB as f32, so that a few slabs in flight stay small beside the model.
SLAB_VALUES = 16 * 2**20


def slabs(
    tensor: TensorRef, order: NDArray[np.int64] | None, values: int = SLAB_VALUES
) -> Iterator[NDArray[np.float32]]:
    """Yield the rows of a tensor as ``float32[rows, columns]``, a bounded number of values at a time.

    Args:
        tensor: any format that can be dequantized.
        order: stored row of each row to yield, or None for the order on disk.
        values: most values in one slab; at least one row is yielded.
    """
    raw = tensor.raw()
    rows = max(1, values // max(1, tensor.shape[-1]))
    for start in range(0, tensor.n_rows, rows):
        stop = min(start + rows, tensor.n_rows)
        stored = raw[start:stop] if order is None else raw[order[start:stop]]
        yield dequantize(stored, tensor.dtype)
