"""Matrix products in plain NumPy: one column after the other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from driftscope.kernels.formats import format_of
from driftscope.kernels.reference.activations import quantize_activation
from driftscope.kernels.reference.dequantize import unpack


def matmul_f32(x: NDArray[np.float32], w: NDArray[np.float32]) -> NDArray[np.float32]:
    """``f32[n, r]``: products and sums rounded to f32, k = 0 first."""
    out = np.zeros((x.shape[0], w.shape[0]), np.float32)
    with np.errstate(all="ignore"):
        for k in range(x.shape[1]):
            out = out + x[:, k, None] * w[None, :, k]
    return out


def matmul_quantized(
    x: NDArray[np.float32], raw: NDArray[np.uint8], dtype: str, activation: str
) -> NDArray[np.float32]:
    """``f32[n, r]`` with integer sums, for formats of integer blocks and an integer activation format."""
    q_x, d_x, s_x = quantize_activation(x, activation)
    return multiply_integers(q_x, d_x, s_x if activation.startswith("q8_1") else None, raw, dtype)


def multiply_integers(
    q_x: NDArray[np.int64],
    d_x: NDArray[np.float32],
    s_x: NDArray[np.float32] | None,
    raw: NDArray[np.uint8],
    dtype: str,
) -> NDArray[np.float32]:
    """`matmul_quantized` from quants ``[n, k]``, scales and, for q8_1, scaled sums ``[n, blocks]``."""
    layout = format_of(dtype)
    n, k = q_x.shape
    r = raw.shape[0]
    q_w, scales, mins, d_w, dmin = unpack(raw, dtype)
    size = min(layout.block_size, k // d_x.shape[1])
    blocks, subs = k // size, size // layout.sub_block
    q_x = q_x.reshape(n, blocks, subs, -1)
    q_w = q_w.reshape(r, blocks, subs, -1)
    scales, mins = scales.reshape(r, blocks, subs), mins.reshape(r, blocks, subs)
    d_x = np.repeat(d_x, blocks // d_x.shape[1], axis=1)
    d_w, dmin = (np.repeat(v.reshape(r, -1), layout.block_size // size, axis=1) for v in (d_w, dmin))
    out = np.zeros((n, r), np.float32)
    with np.errstate(all="ignore"):
        for b in range(blocks):
            products = np.einsum("tsi,rsi,rs->tr", q_x[:, b], q_w[:, b], scales[:, b])
            term = d_w[:, b] * d_x[:, b, None] * products.astype(np.float32)
            if layout.offset == "add" and s_x is not None:
                term = term + dmin[:, b] * s_x[:, b, None]
            elif layout.offset != "none":
                sums = np.einsum("tsi,rs->tr", q_x[:, b], mins[:, b]).astype(np.float32)
                offset = dmin[:, b] * d_x[:, b, None] * sums
                term = term - offset if layout.offset == "subtract" else term + offset
            out = out + term
    return out
