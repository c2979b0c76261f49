"""Matrix products with a fixed order of accumulation.

``matmul_f32`` is path A: f32 products summed one after the other in f32, first column first. No fused
multiply-add, no reordering: the chain of an output is the same whatever the other rows, the number of
threads and the width of the vectors, because vectors run across tokens and never along a row.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from driftscope.errors import InputError
from driftscope.kernels.activations import RoundedActivation, quantize_activation
from driftscope.kernels.dequantize import dequantize, expand, plain_values, slab_rows
from driftscope.kernels.formats import format_of, row_columns
from driftscope.kernels.integer_tiles import Blocks, IntegerPanels, IntegerRows, multiply_integer_panels
from driftscope.kernels.parallel import over_rows
from driftscope.kernels.tiles import multiply_panels, pack_f32
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
    return _in_slabs(x, w.shape, threads, lambda: lambda first, end: w[first:end])


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
    shape = (raw.shape[0], row_columns(dtype, raw.shape[1]))
    if layout.is_integer:
        raw, n_columns = check_raw(raw, dtype)
        slab = min(slab_rows(n_columns), max(1, shape[0]))

        def reader() -> Callable[[int, int], NDArray[np.float32]]:
            unpacked = UnpackedRows.empty(layout, slab, n_columns)
            values = np.empty((slab, n_columns), np.float32)

            def read(first: int, end: int) -> NDArray[np.float32]:
                unpacked.fill(raw, first, end)
                expand(unpacked, values[: end - first])
                return values[: end - first]

            return read

        return _in_slabs(x, shape, threads, reader)
    if layout.native:
        return _in_slabs(x, shape, threads, lambda: lambda first, end: plain_values(raw[first:end], dtype))
    return _in_slabs(x, shape, threads, lambda: lambda first, end: dequantize(raw[first:end], dtype))


Reader = Callable[[int, int], NDArray[np.float32]]


def _in_slabs(
    x: NDArray[np.float32], shape: tuple[int, ...], threads: int, reader: Callable[[], Reader]
) -> NDArray[np.float32]:
    """Multiply `x` with rows that ``reader()`` gives as ``f32[end - first, k]``; one reader a range."""
    n_rows, n_columns = shape
    check_factor(x, n_columns)
    out = np.empty((x.shape[0], n_rows), np.float32)
    panels = pack_f32(x)
    slab = slab_rows(n_columns)

    def work(first: int, end: int) -> None:
        read = reader()
        for start in range(first, end, slab):
            multiply_panels(panels, read(start, min(end, start + slab)), out, start)

    over_rows(work, n_rows, threads=threads, grain=slab)
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
    quantized = quantize_activation(x, layout.activation if activation is None else activation)
    if isinstance(quantized, RoundedActivation):
        return matmul_f32_quantized(quantized.values, raw, dtype, threads=threads)
    if not layout.is_integer:
        raise InputError(f"there is no integer dot product of {dtype} weights with {quantized.format}")
    raw, _ = check_raw(raw, dtype)
    shared = Blocks.of(layout, quantized)
    panels = IntegerPanels.of(quantized, shared)
    out = np.empty((x.shape[0], raw.shape[0]), np.float32)
    slab = slab_rows(n_columns)

    def work(first: int, end: int) -> None:
        rows = IntegerRows.empty(layout, shared, min(slab, end - first), n_columns)
        for start in range(first, end, slab):
            stop = min(end, start + slab)
            rows.fill(raw, start, stop)
            multiply_integer_panels(
                *(panels.quants, panels.extras, panels.d, panels.s),
                *(rows.quants, rows.extras, rows.d, rows.dmin),
                *(layout.offset != "none", stop - start, out, start),
            )

    over_rows(work, raw.shape[0], threads=threads, grain=slab)
    return out
