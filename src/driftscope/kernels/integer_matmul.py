"""Integer matrix products: rows unpacked a few at a time, and the kernel that suits the number of tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from driftscope.kernels.activations import QuantizedActivation
from driftscope.kernels.formats import BlockFormat, row_columns
from driftscope.kernels.integer_dots import Tokens, dot_rows, fits
from driftscope.kernels.integer_rows import IntegerRows, Shared
from driftscope.kernels.integer_tiles import Multiplier, pack
from driftscope.kernels.parallel import over_rows

# Bytes of quants that are unpacked at a time, to stay in the second-level cache.
_SLAB_BYTES = 1 << 18

# Multiply-adds below which a range of rows is not worth handing to another thread: about 80 microseconds.
_RANGE = 1 << 21

# Tokens up to which rows are multiplied where they lie: quants kept in 16 bits cost more to unpack.
_FEW, _FEW_WORDS = 4, 8


def multiply_integers(
    activation: QuantizedActivation, raw: NDArray[np.uint8], layout: BlockFormat, *, threads: int
) -> NDArray[np.float32]:
    """``float32[n, r]``: an activation times rows; see `driftscope.kernels.matmul.matmul_quantized`.

    Args:
        activation: n tokens.
        raw: ``uint8[r, row_bytes]``, C-contiguous.
        layout: format of the rows, one that is integers.
        threads: number of threads; the result does not depend on it.
    """
    shared = Shared.of(layout, activation)
    n_rows, n_columns = raw.shape[0], row_columns(layout.name, raw.shape[1])
    out = np.empty((activation.quants.shape[0], n_rows), np.float32)
    if out.shape[0] <= (_FEW if shared.steps else _FEW_WORDS) and fits(layout, activation, shared, n_rows):
        tokens = Tokens.of(activation, layout)
        grain = max(64, _RANGE // (n_columns * out.shape[0]) // 8 * 8)
        over_rows(
            lambda first, end: dot_rows(tokens, raw, layout, first, end, out),
            n_rows,
            threads=threads,
            grain=grain,
        )
        return out
    panels = pack(activation, shared)
    slab = max(8, _SLAB_BYTES // max(1, n_columns * (1 if shared.steps else 2)) // 8 * 8)
    slab = min(slab, -(-n_rows // threads // 8) * 8)
    spare: list[tuple[IntegerRows, list[Multiplier]]] = []

    def work(first: int, end: int) -> None:
        if spare:
            rows, multipliers = spare.pop()
        else:
            rows = IntegerRows.empty(layout, shared, slab, n_columns)
            multipliers = [Multiplier(part, rows) for part in panels]
        for start in range(first, end, slab):
            stop = min(end, start + slab)
            rows.fill(raw, start, stop)
            for multiplier in multipliers:
                multiplier.multiply(stop - start, out, start)
        spare.append((rows, multipliers))

    over_rows(work, n_rows, threads=threads, grain=slab)
    return out
