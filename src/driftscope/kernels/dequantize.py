"""Dequantize rows of any format to f32, bit for bit as ggml's ``dequantize_row_*`` does where ggml has it."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.kernels.float8 import widen_float8
from driftscope.kernels.float_vectors import (
    scale_16,
    scale_16_add,
    scale_16_subtract,
    widen_bf16,
    widen_f16,
)
from driftscope.kernels.formats import BlockFormat, format_of, row_columns
from driftscope.kernels.jit import kernel
from driftscope.kernels.parallel import over_rows
from driftscope.kernels.unpack import UnpackedRows, check_raw

# Values unpacked at a time: small enough to stay in the second-level cache, large enough that the
# calls from Python do not matter.
SLAB_VALUES = 1 << 16

# How a kernel is told what `BlockFormat.offset` says.
OFFSETS = {"none": 0, "subtract": 1, "add": 2}


def dequantize(raw: NDArray[np.uint8], dtype: str, *, threads: int = 1) -> NDArray[np.float32]:
    """The values of rows of a stored tensor.

    Args:
        raw: ``uint8[rows, row_bytes]``, the stored bytes; may be read-only.
        dtype: format name, see `driftscope.kernels.formats`. F64 is rounded to f32.
        threads: number of threads; the result does not depend on it.

    Returns:
        ``float32[rows, columns]``. Non-finite scales give what IEEE arithmetic gives.

    Raises:
        InputError: unknown format, or a row that is not a whole number of blocks.
    """
    layout = format_of(dtype)
    if not layout.native:
        return _through_gguf(raw, layout)
    if dtype in ("F32", "F64"):
        return _stored_floats(raw, dtype)
    raw, n_columns = check_raw(raw, dtype)
    if layout.ggml_type < 0:
        return widen_float8(raw, dtype, threads=threads)
    out = np.empty((raw.shape[0], n_columns), np.float32)
    slab = slab_rows(n_columns)
    if not layout.is_integer:
        over_rows(partial(_widen_rows, raw, dtype == "F16", out), raw.shape[0], threads=threads, grain=slab)
        return out

    def work(first: int, end: int) -> None:
        unpacked = UnpackedRows.empty(layout, min(slab, end - first), n_columns)
        for start in range(first, end, slab):
            stop = min(end, start + slab)
            unpacked.fill(raw, start, stop)
            expand(unpacked, out[start:stop])

    over_rows(work, raw.shape[0], threads=threads, grain=slab)
    return out


def slab_rows(n_columns: int) -> int:
    """Rows that are unpacked at a time: about `SLAB_VALUES` values, a multiple of four rows."""
    return max(4, SLAB_VALUES // max(1, n_columns) // 4 * 4)


def _stored_floats(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """Rows of F32 or F64 as f32; a view of the bytes where that is possible."""
    columns = row_columns(dtype, raw.shape[1])
    with np.errstate(all="ignore"):  # an F64 beyond f32 becomes infinite
        values = np.ascontiguousarray(raw).view({"F32": "<f4", "F64": "<f8"}[dtype])
        values = values.astype(np.float32, copy=False)
    return np.require(values.reshape(-1, columns), requirements="A")


@kernel("void(R(uint8, 2), boolean, f4[:,::1], int64, int64)")
def _widen_rows(raw: Any, is_half: bool, out: Any, first: int, end: int) -> None:
    """Rows ``first .. end`` of F16 or BF16 as f32."""
    columns = out.shape[1]
    padded = np.zeros(16, np.uint8)
    eight = np.zeros(8, np.float32)
    for r in range(first, end):
        at, to = r * raw.shape[1], r * columns
        for c in range(0, columns - columns % 8, 8):
            if is_half:
                widen_f16(raw, at + 2 * c, out, to + c)
            else:
                widen_bf16(raw, at + 2 * c, out, to + c)
        if columns % 8:
            c = columns - columns % 8
            for i in range(2 * (columns - c)):
                padded[i] = raw[r, 2 * c + i]
            if is_half:
                widen_f16(padded, 0, eight, 0)
            else:
                widen_bf16(padded, 0, eight, 0)
            for i in range(columns - c):
                out[r, c + i] = eight[i]


def expand(unpacked: UnpackedRows, out: NDArray[np.float32]) -> None:
    """The f32 values of the first ``len(out)`` unpacked rows."""
    layout = unpacked.layout
    _expand_rows(
        layout.sub_block,
        layout.block_size,
        OFFSETS[layout.offset],
        unpacked.quants,
        unpacked.scales,
        unpacked.mins,
        unpacked.d,
        unpacked.dmin,
        out,
    )


@kernel("void(int64, int64, int64, int8[:,::1], int8[:,::1], int8[:,::1], f4[:,::1], f4[:,::1], f4[:,::1])")
def _expand_rows(
    sub_block: int,
    block: int,
    offset: int,
    quants: Any,
    scales: Any,
    mins: Any,
    d: Any,
    dmin: Any,
    out: Any,
) -> None:
    subs_a_block = block // sub_block
    for r in range(out.shape[0]):
        for b in range(d.shape[1]):
            for s in range(b * subs_a_block, (b + 1) * subs_a_block):
                scale = d[r, b] * np.float32(scales[r, s])
                shift = dmin[r, b] * np.float32(mins[r, s])
                for part in range(sub_block // 16):
                    at = r * out.shape[1] + s * sub_block + part * 16
                    if offset == 0:
                        scale_16(quants, at, scale, shift, out, at)
                    elif offset == 1:
                        scale_16_subtract(quants, at, scale, shift, out, at)
                    else:
                        scale_16_add(quants, at, scale, shift, out, at)


def _through_gguf(raw: NDArray[np.uint8], layout: BlockFormat) -> NDArray[np.float32]:
    from gguf import GGMLQuantizationType, quants

    columns = row_columns(layout.name, raw.shape[1])
    with np.errstate(all="ignore"):
        values = quants.dequantize(np.ascontiguousarray(raw), GGMLQuantizationType(layout.ggml_type))
    return np.asarray(values, np.float32).reshape(raw.shape[0], columns)
