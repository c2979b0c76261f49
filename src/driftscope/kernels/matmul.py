"""Matrix products with a fixed order of accumulation.

``matmul_f32`` is path A: f32 products summed one after the other in f32, first column first. No fused
multiply-add, no reordering: the chain of an output is the same whatever the other rows, the number of
threads and the width of the vectors, because vectors run across rows of weights and never along one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from driftscope.errors import InputError
from driftscope.kernels.activations import RoundedActivation, quantize_activation
from driftscope.kernels.dequantize import OFFSETS, SLAB_VALUES, dequantize
from driftscope.kernels.float_tiles import (
    FLOAT_KINDS,
    WIDTH,
    block_rows,
    multiply_floats,
    multiply_unpacked,
    pack_tokens,
)
from driftscope.kernels.formats import BlockFormat, format_of, row_columns
from driftscope.kernels.integer_matmul import multiply_integers
from driftscope.kernels.parallel import over_rows
from driftscope.kernels.unpack import UnpackedRows, check_raw


def matmul_f32(x: NDArray[np.float32], w: NDArray[np.float32], *, threads: int = 1) -> NDArray[np.float32]:
    """``out[t, r] = sum over k of w[r, k] * x[t, k]``, in f32, k = 0 first, each operation rounded.

    Args:
        x: ``float32[n, k]``, one row a token.
        w: ``float32[r, k]``, one row an output.
        threads: number of threads; the result does not depend on it.

    Returns:
        ``float32[n, r]``. A row of the result depends on its row of `x` alone. Infinities and NaNs follow
        IEEE; the payload of a NaN is not specified.
    """
    w = np.ascontiguousarray(w, np.float32)
    return _floats(x, w.view(np.uint8), "F32", threads)


def matmul_f32_quantized(
    x: NDArray[np.float32], raw: NDArray[np.uint8], dtype: str, *, threads: int = 1
) -> NDArray[np.float32]:
    """`matmul_f32` with stored rows of any format, dequantized a few at a time.

    Args:
        x: ``float32[n, k]``.
        raw: ``uint8[r, row_bytes]``, the stored rows.
        dtype: format name, see `driftscope.kernels.formats`.
        threads: number of threads; the result does not depend on it.

    Returns:
        ``float32[n, r]``, bit for bit ``matmul_f32(x, dequantize(raw, dtype))``.

    Raises:
        InputError: unknown format, or a row that does not have k values.
    """
    layout = format_of(dtype)
    if layout.is_integer:
        return _blocks(x, raw, layout, threads)
    if dtype in FLOAT_KINDS:
        return _floats(x, raw, dtype, threads)
    check_factor(x, row_columns(dtype, raw.shape[1]))
    out = np.empty((x.shape[0], raw.shape[0]), np.float32)
    for first in range(0, raw.shape[0], _ROWS_READ):
        rows = dequantize(raw[first : first + _ROWS_READ], dtype, threads=threads)
        out[:, first : first + _ROWS_READ] = matmul_f32(x, rows, threads=threads)
    return out


# Rows of a format without a kernel of ours that are held as f32 at a time.
_ROWS_READ = 512


def _floats(x: NDArray[np.float32], raw: NDArray[np.uint8], dtype: str, threads: int) -> NDArray[np.float32]:
    """`x` times stored rows of F32, BF16 or F16."""
    raw, n_columns = check_raw(raw, dtype)
    check_factor(x, n_columns)
    out = np.empty((x.shape[0], raw.shape[0]), np.float32)
    if not x.shape[0]:
        return out
    packed, kind, rows_a_block = pack_tokens(x), FLOAT_KINDS[dtype], block_rows(x.shape[0])

    def work(first: int, end: int) -> None:
        multiply_floats(packed, x.shape[0], raw, kind, rows_a_block, first, end, out)

    over_rows(work, raw.shape[0], threads=threads, grain=WIDTH)
    return out


def _blocks(
    x: NDArray[np.float32], raw: NDArray[np.uint8], layout: BlockFormat, threads: int
) -> NDArray[np.float32]:
    """`x` times stored rows of a block format."""
    raw, n_columns = check_raw(raw, layout.name)
    check_factor(x, n_columns)
    out = np.empty((x.shape[0], raw.shape[0]), np.float32)
    if not x.shape[0]:
        return out
    packed = pack_tokens(x)
    rows_a_block = block_rows(x.shape[0])
    slab = max(1, SLAB_VALUES // max(1, n_columns) // rows_a_block) * rows_a_block

    def work(first: int, end: int) -> None:
        rows = UnpackedRows.empty(layout, min(slab, -(-(end - first) // WIDTH) * WIDTH), n_columns)
        for start in range(first, end, slab):
            stop = min(end, start + slab)
            rows.fill(raw, start, stop)
            multiply_unpacked(
                *(packed, x.shape[0], rows.quants, rows.scales, rows.mins, rows.d, rows.dmin),
                *(layout.sub_block, layout.block_size, OFFSETS[layout.offset]),
                *(rows_a_block, stop - start, out, start),
            )

    over_rows(work, raw.shape[0], threads=threads, grain=WIDTH)
    return out


def check_factor(x: NDArray[np.float32], n_columns: int) -> None:
    """Refuse an `x` that cannot be multiplied with rows of `n_columns` values."""
    if x.ndim != 2 or x.shape[1] != n_columns:
        raise InputError(f"cannot multiply x of shape {list(x.shape)} with rows of {n_columns} values")


def matmul_quantized(
    x: NDArray[np.float32],
    raw: NDArray[np.uint8],
    dtype: str,
    *,
    activation: str | None = None,
    threads: int = 1,
) -> NDArray[np.float32]:
    """Path B: quantize the activation, multiply in integers, scale.

    For each block ``b``, the smaller of the weight's and the activation's, in order, in f32:
    ``total += (d_w * d_x) * f32(sum of scale * q_w * q_x) - (dmin_w * d_x) * f32(sum of min * sum of q_x)``;
    the sums in integers, exact. Q4_1 and Q5_1 with q8_1 use its f16 ``s`` as ggml does: ``... + m * s``.

    Args:
        x: ``float32[n, k]``.
        raw: ``uint8[r, row_bytes]``, the stored rows.
        dtype: format of the rows.
        activation: activation format; None for the one that ggml multiplies `dtype` with. With a float
            format (``none``, ``f16``, ``bf16``) the rows are dequantized and multiplied by `matmul_f32`.
        threads: number of threads; the result does not depend on it.

    Returns:
        ``float32[n, r]``. A row of the result depends on its row of `x` alone.

    Raises:
        InputError: unknown format, sizes that do not fit, or a format without an integer dot product.
    """
    layout = format_of(dtype)
    n_columns = row_columns(dtype, raw.shape[1])
    check_factor(x, n_columns)
    if activation is None and not layout.native:
        raise InputError(f"there is no integer dot product for {dtype}: choose a float activation format")
    fmt = layout.activation if activation is None else activation
    quantized = quantize_activation(x, fmt, threads=threads)
    if isinstance(quantized, RoundedActivation):
        return matmul_f32_quantized(quantized.values, raw, dtype, threads=threads)
    if not layout.is_integer:
        raise InputError(f"there is no integer dot product of {dtype} weights with {quantized.format}")
    raw, _ = check_raw(raw, dtype)
    return multiply_integers(quantized, raw, layout, threads=threads)
