"""Tiles of integer matrix products, one for all formats.

Both factors are brought to the same form: int16 quants with the integer scales multiplied in, one f32 scale
a block, and a few extra integers a block for the minima (the minima themselves on one side, sums of quants
on the other). The product of a block is then one integer dot product and one f32 scale, whatever the format.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.kernels.activations import QuantizedActivation
from driftscope.kernels.formats import BlockFormat
from driftscope.kernels.jit import kernel
from driftscope.kernels.tiles import scatter
from driftscope.kernels.unpack import UnpackedRows
from driftscope.kernels.vectors import (
    LANES,
    ROWS,
    accumulate_blocks,
    accumulate_blocks_with_minimum,
    fold_16,
)

# Columns that are worked on at a time: a panel of 1024 x 16 int16 is 32 KiB (see `driftscope.kernels.tiles`).
_DEPTH = 1024


@dataclass(frozen=True)
class Blocks:
    """What the two factors of an integer product share.

    Attributes:
        size: values in a block, the smaller of the two formats'.
        sub_block: values that share an integer minimum.
        extras: integers a block beside the quants, for the minima: one a sub-block, at least two.
        f16_sum: whether the minima multiply q8_1's ``s`` and not sums of the quants.
    """

    size: int
    sub_block: int
    extras: int
    f16_sum: bool

    @classmethod
    def of(cls, layout: BlockFormat, activation: QuantizedActivation) -> Blocks:
        """For a weight format and an activation."""
        size = min(layout.block_size, activation.block_size)
        f16_sum = layout.offset == "add" and activation.s is not None
        return cls(size, layout.sub_block, max(2, size // layout.sub_block), f16_sum)


@dataclass(frozen=True)
class IntegerPanels:
    """An activation, LANES tokens side by side and pairs of columns adjacent, padded with zeros."""

    quants: NDArray[np.int16]
    extras: NDArray[np.int16]
    d: NDArray[np.float32]
    s: NDArray[np.float32]

    @classmethod
    def of(cls, activation: QuantizedActivation, shared: Blocks) -> IntegerPanels:
        """Pack an activation."""
        n, k = activation.quants.shape
        tiles, blocks = -(-n // LANES), k // shared.size
        repeat = activation.block_size // shared.size
        quants = np.zeros((tiles, blocks, shared.size // 2, LANES, 2), np.int16)
        extras = np.zeros((tiles, blocks, shared.extras // 2, LANES, 2), np.int16)
        d = np.zeros((tiles, blocks, LANES), np.float32)
        s = d
        _pack_integers(activation.quants, activation.d, repeat, shared.sub_block, quants, extras, d)
        if shared.f16_sum:
            assert activation.s is not None
            extras[:, :, 0, :, 0] = 1
            padded = np.zeros((tiles * LANES, blocks), np.float32)
            padded[:n] = activation.s
            s = np.ascontiguousarray(padded.reshape(tiles, LANES, blocks).transpose(0, 2, 1))
        return cls(quants, extras, d, s)


@dataclass(frozen=True)
class IntegerRows:
    """Rows of a weight with the integer scales multiplied into the quants, which int16 holds exactly."""

    shared: Blocks
    unpacked: UnpackedRows
    quants: NDArray[np.int16]
    extras: NDArray[np.int16]
    d: NDArray[np.float32]
    dmin: NDArray[np.float32]

    @classmethod
    def empty(cls, layout: BlockFormat, shared: Blocks, n_rows: int, n_columns: int) -> IntegerRows:
        """Room for `n_rows` rows, zeroed."""
        blocks = n_columns // shared.size
        return cls(
            shared,
            UnpackedRows.empty(layout, n_rows, n_columns),
            np.zeros((n_rows, n_columns), np.int16),
            np.zeros((n_rows, blocks, shared.extras), np.int16),
            np.zeros((n_rows, blocks), np.float32),
            np.zeros((n_rows, blocks), np.float32),
        )

    def fill(self, raw: NDArray[np.uint8], first: int, end: int) -> None:
        """Take rows ``first..end`` of `raw` as rows ``0..end-first``."""
        unpacked, layout = self.unpacked, self.unpacked.layout
        unpacked.fill(raw, first, end)
        _fold_rows(
            *(end - first, layout.sub_block, layout.block_size // self.shared.size, layout.offset == "add"),
            *(unpacked.quants, unpacked.scales, unpacked.mins, unpacked.d, unpacked.dmin),
            *(self.quants, self.extras, self.d, self.dmin),
        )


@kernel("void(R(int8, 2), R(f4, 2), int64, int64, int16[:,:,:,:,::1], int16[:,:,:,:,::1], f4[:,:,::1])")
def _pack_integers(
    quants: Any, d: Any, repeat: int, sub_block: int, out: Any, extras: Any, out_d: Any
) -> None:
    """Quants, their sums over sub-blocks and their scales, as `IntegerPanels` holds them."""
    half = out.shape[2]
    for t in range(quants.shape[0]):
        tile, lane = t // LANES, t % LANES
        for b in range(out.shape[1]):
            first = b * half * 2
            for pair in range(half):
                out[tile, b, pair, lane, 0] = quants[t, first + 2 * pair]
                out[tile, b, pair, lane, 1] = quants[t, first + 2 * pair + 1]
            for sub in range(2 * half // sub_block):
                total = 0
                for i in range(sub_block):
                    total += quants[t, first + sub * sub_block + i]
                extras[tile, b, sub // 2, lane, sub % 2] = total
            out_d[tile, b, lane] = d[t, b // repeat]


@kernel(
    "void(int64, int64, int64, boolean, int8[:,::1], int8[:,::1], int8[:,::1], f4[:,::1], f4[:,::1],"
    " int16[:,::1], int16[:,:,::1], f4[:,::1], f4[:,::1])"
)
def _fold_rows(
    n_rows: int,
    sub_block: int,
    repeat: int,
    negate: bool,
    quants: Any,
    scales: Any,
    mins: Any,
    d: Any,
    dmin: Any,
    out: Any,
    extras: Any,
    out_d: Any,
    out_dmin: Any,
) -> None:
    """Unpacked rows as `IntegerRows` holds them; the minima of Q4_1 and Q5_1 are added, so negated here."""
    blocks = out_d.shape[1]
    subs = scales.shape[1] // blocks
    for r in range(n_rows):
        for s in range(scales.shape[1]):
            scale = np.int16(scales[r, s])
            for part in range(sub_block // 16):
                at = r * out.shape[1] + s * sub_block + part * 16
                fold_16(quants, at, scale, out, at)
            extras[r, s // subs, s % subs] = mins[r, s]
        for b in range(blocks):
            out_d[r, b] = d[r, b // repeat]
            out_dmin[r, b] = -dmin[r, b // repeat] if negate else dmin[r, b // repeat]


@kernel(
    "void(int16[:,:,:,:,::1], int16[:,:,:,:,::1], f4[:,:,::1], f4[:,:,::1],"
    " int16[:,::1], int16[:,:,::1], f4[:,::1], f4[:,::1], boolean, int64, f4[:, ::1], int64)"
)
def multiply_integer_panels(
    panel: Any,
    panel_extra: Any,
    panel_d: Any,
    panel_s: Any,
    rows: Any,
    rows_extra: Any,
    rows_d: Any,
    rows_dmin: Any,
    with_minimum: bool,
    n_rows: int,
    out: Any,
    to: int,
) -> None:
    """Columns ``to..`` of `out`; the loops are those of `multiply_panels`."""
    tiles, blocks, pairs = panel.shape[:3]
    extra_pairs = panel_extra.shape[2]
    groups = (n_rows + ROWS - 1) // ROWS
    sums = np.zeros((tiles, groups, ROWS, LANES), np.float32)
    parts = (blocks * pairs * 2 + _DEPTH - 1) // _DEPTH
    last = n_rows - 1
    for part in range(parts):
        block = blocks * part // parts
        count = blocks * (part + 1) // parts - block
        for tile in range(tiles):
            for group in range(groups):
                r = group * ROWS
                r1, r2, r3 = min(r + 1, last), min(r + 2, last), min(r + 3, last)
                at = (tile * groups + group) * ROWS * LANES
                # fmt: off
                if with_minimum:
                    accumulate_blocks_with_minimum(
                        panel, panel_extra, panel_d, panel_s, tile, rows, rows_extra, rows_d, rows_dmin,
                        r, r1, r2, r3, sums, at, block, count, pairs, extra_pairs, blocks,
                    )
                else:
                    accumulate_blocks(
                        panel, panel_extra, panel_d, panel_s, tile, rows, rows_extra, rows_d, rows_dmin,
                        r, r1, r2, r3, sums, at, block, count, pairs, extra_pairs, blocks,
                    )
                # fmt: on
    scatter(sums, n_rows, out, to)
