"""Floats of eight bits: a table of 256 values each, all of them exact in f32.

Sources: Micikevicius et al., "FP8 formats for deep learning", 2022 (E4M3 without infinities and E5M2); the
``FNUZ`` variants of ONNX and AMD, with a bias of one more, one NaN and one zero; OCP's microscaling formats
(MX) 1.0 for E8M0, the power of two that scales a block.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from driftscope.kernels.jit import kernel
from driftscope.kernels.parallel import over_rows


class Float8(NamedTuple):
    """How the bits of a format are read.

    Attributes:
        mantissa_bits: of the value; what they and the sign leave of the byte is the exponent.
        bias: of the exponent.
        special: ``ieee`` (the largest exponent is infinite or NaN), ``finite`` (only all ones are NaN) or
            ``fnuz`` (only the pattern of minus zero is NaN).
    """

    mantissa_bits: int
    bias: int
    special: str


FLOAT8: dict[str, Float8] = {
    "F8_E4M3": Float8(3, 7, "finite"),
    "F8_E5M2": Float8(2, 15, "ieee"),
    "F8_E4M3FNUZ": Float8(3, 8, "fnuz"),
    "F8_E5M2FNUZ": Float8(2, 16, "fnuz"),
}
E8M0 = "F8_E8M0"

_GRAIN = 1 << 14


@cache
def table_of(name: str) -> NDArray[np.float32]:
    """The value of each byte as ``float32[256]``."""
    codes = np.arange(256)
    if name == E8M0:
        values = np.ldexp(1.0, codes - 127)
        values[255] = np.nan
    else:
        bits, bias, special = FLOAT8[name]
        exponent, mantissa = (codes & 127) >> bits, codes & ((1 << bits) - 1)
        fraction = mantissa / (1 << bits) + (exponent > 0)
        values = np.ldexp(fraction, np.maximum(exponent, 1) - bias)
        if special == "finite":
            values[127::128] = np.nan
        elif special == "ieee":
            highest = exponent == exponent.max()
            values[highest] = np.where(mantissa[highest] > 0, np.nan, np.inf)
        values[128:] = -values[128:]
        if special == "fnuz":
            values[128] = np.nan
    table = values.astype(np.float32)
    table.setflags(write=False)
    return table


def widen_float8(raw: NDArray[np.uint8], name: str, *, threads: int = 1) -> NDArray[np.float32]:
    """The values of ``uint8[rows, columns]`` as f32."""
    out = np.empty(raw.shape, np.float32)
    table = table_of(name)
    grain = max(1, _GRAIN // max(1, raw.shape[1]))
    over_rows(partial(_look_up, raw, table, out), raw.shape[0], threads=threads, grain=grain)
    return out


@kernel("void(R(uint8, 2), R(f4, 1), f4[:,::1], int64, int64)")
def _look_up(raw: Any, table: Any, out: Any, first: int, end: int) -> None:
    for r in range(first, end):
        for c in range(out.shape[1]):
            out[r, c] = table[raw[r, c]]
