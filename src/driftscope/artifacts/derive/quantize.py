"""Rows of f32 values to the bytes of a block format."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import gguf
import libgguf
import numpy as np
from numpy.typing import NDArray

from driftscope.kernels.formats import row_bytes


def quantize(rows: NDArray[np.float32], fmt: str, *, threads: int = 1) -> NDArray[np.uint8]:
    """Quantize rows as llama.cpp does without an importance matrix (``ggml_quantize_chunk``).

    Args:
        rows: ``float32[n, columns]``, finite, contiguous.
        fmt: ``F32``, ``F16``, ``BF16`` or a block format whose block size divides the columns.
        threads: rows are independent, so any number gives the same bytes; libgguf releases the
            interpreter lock.

    Returns:
        ``uint8[n, row_bytes]``.
    """
    kind = int(gguf.GGMLQuantizationType[fmt])
    out = np.empty((rows.shape[0], row_bytes(fmt, rows.shape[1])), dtype=np.uint8)
    if fmt in ("F32", "F16", "BF16"):
        out[:] = gguf.quants.quantize(rows, gguf.GGMLQuantizationType(kind)).view(np.uint8).reshape(out.shape)
        return out

    def part(bounds: tuple[int, int]) -> None:
        start, stop = bounds
        libgguf.quantize_rows_into_raw(kind, rows[start:stop], out[start:stop], stop - start, rows.shape[1])

    spans = list(_spans(rows.shape[0], threads))
    if len(spans) == 1:
        part(spans[0])
    else:
        with ThreadPoolExecutor(len(spans)) as pool:
            list(pool.map(part, spans))
    return out


def _spans(count: int, parts: int) -> Iterator[tuple[int, int]]:
    """Cut ``range(count)`` into at most `parts` runs of about the same length."""
    parts = max(1, min(parts, count))
    yield from pairwise(count * index // parts for index in range(parts + 1))
