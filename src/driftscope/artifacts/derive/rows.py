"""The values of a stored tensor, slab by slab, with its rows and its values as another file wants them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.tensor import TensorRef
from driftscope.errors import InputError
from driftscope.kernels.dequantize import dequantize

# Values of one slab: 64 MiB as f32, so that a few slabs in flight stay small beside the model.
SLAB_VALUES = 16 * 2**20


def slabs(
    tensor: TensorRef,
    order: NDArray[np.int64] | None,
    values: int = SLAB_VALUES,
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


def shifted(
    parts: Iterator[NDArray[np.float32]], tensor: TensorRef, offset: float
) -> Iterator[NDArray[np.float32]]:
    """Slabs of a tensor whose stored values are to be the canonical ones plus `offset`, in f32.

    Gemma's norm weights are used as ``1 + w``, and GGUF stores ``1 + w``. Where a file made from some ``w``
    gives a sum, the sum minus one is exact and gives the sum again: what the model multiplies by comes
    through every copy bit for bit, though the last bits of a small ``w`` do not.

    Args:
        parts: slabs as `slabs` yields them.
        tensor: where they come from.
        offset: the `TensorRef.value_offset` of the copy.

    Raises:
        InputError: the copy would not stand for the same sum.
    """
    change = np.float32(offset - tensor.value_offset)
    for slab in parts:
        if not change:
            yield slab
            continue
        result = slab + change
        if change < 0 and not np.array_equal(result - change, slab, equal_nan=True):
            raise InputError(
                f"{tensor.file}: {tensor.stored_name} holds values that are no f32 plus {-change:g}, so that "
                f"{tensor.name} cannot be written without it"
            )
        yield result
