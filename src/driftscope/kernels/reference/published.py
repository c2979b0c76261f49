"""The published investigation's fixtures and its two arithmetics, value by value.

The published programs are scalar f32 code; every operation here is one f32 operation in their order, so
that the published bits come out. Nothing is drawn at random: all fixtures are small formulas.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from driftscope.kernels.reference.dequantize import dequantize, unpack

F32 = NDArray[np.float32]

VALUES = 256
CHAIN_ROWS = 256


def activation(token: int = 0) -> F32:
    """``f32[256]``: ``a[i] = (i - 128) * 0.05 + ((i mod 7) + token) * 0.01``, evaluated as written."""
    i = np.arange(VALUES)
    ramp = (i - 128).astype(np.float32) * np.float32(0.05)
    return ramp + ((i % 7) + token).astype(np.float32) * np.float32(0.01)


def block_bytes(
    *, d: bytes = b"\x00\x3c", dmin: bytes = b"\x00\xb4", scale_offset: int = 3, quant_offset: int = 17
) -> NDArray[np.uint8]:
    """``uint8[144]``, one Q4_K super-block.

    Scale byte k (of 12) is ``(7 k + scale_offset) mod 256``, quant byte k (of 128) is
    ``(13 k + quant_offset) mod 256``.

    Args:
        d: the two bytes of the scale, little-endian f16; 1.0 by default.
        dmin: the two bytes of the scale of the minima; -0.25 by default.
        scale_offset: offset of the scale bytes.
        quant_offset: offset of the quant bytes.
    """
    scales = (7 * np.arange(12) + scale_offset) % 256
    quants = (13 * np.arange(128) + quant_offset) % 256
    head = np.frombuffer(d + dmin, np.uint8)
    return np.concatenate([head, scales.astype(np.uint8), quants.astype(np.uint8)])


def chained_tensor(depth: int) -> NDArray[np.uint8]:
    """``uint8[256, 144]``: the 256 x 256 Q4_K matrix number `depth` of the published chain."""
    rows = [
        block_bytes(scale_offset=3 + row + 11 * depth, quant_offset=17 + 3 * row + 19 * depth)
        for row in range(CHAIN_ROWS)
    ]
    return np.stack(rows)


def path_a_dot(block: NDArray[np.uint8], x: F32) -> np.float32:
    """Dequantize a row of Q4_K, then sum the products left to right, all in f32.

    Args:
        block: ``uint8[m * 144]``, m super-blocks of one row.
        x: ``float32[m * 256]``.
    """
    return path_a_matmul(block[None, :], x)[0]


def path_a_matmul(rows: NDArray[np.uint8], x: F32) -> F32:
    """`path_a_dot` of each row of ``uint8[r, m * 144]``: ``float32[r]``."""
    weights = dequantize(rows, "Q4_K")
    total = np.zeros(rows.shape[0], np.float32)
    for k in range(weights.shape[1]):
        total = total + weights[:, k] * x[k]
    return total


def quantize_apr_q8k(x: F32) -> tuple[NDArray[np.int64], F32]:
    """The published activation format: ``int[m, 256]`` and the scale of each 256 values, ``float32[m]``.

    scale = max|x| / 127, or 1/127 where max|x| <= 1e-10; quant = x / scale rounded half away from zero,
    clamped to [-128, 127]. It is not ggml's q8_K, which keeps the sign of the largest value.
    """
    blocks = np.asarray(x, np.float32).reshape(-1, VALUES)
    largest = np.abs(blocks).max(axis=1)
    scale = np.where(largest > np.float32(1e-10), largest / np.float32(127), np.float32(1) / np.float32(127))
    ratio = blocks / scale[:, None]
    whole = np.trunc(ratio)
    away = whole + np.where(np.abs(ratio - whole) >= np.float32(0.5), np.copysign(np.float32(1), ratio), 0)
    return np.clip(away, -128, 127).astype(np.int64), scale.astype(np.float32)


def path_b_dot(block: NDArray[np.uint8], x: F32) -> np.float32:
    """Quantize the activation to ``apr_q8k`` and multiply in integers, accumulating as published.

    For each 64 values, the low nibbles and then the high ones:
    ``acc += (d * sc * s8) * sum(q4 * q8) - (dmin * m * s8) * sum(q8)``, in f32.

    Args:
        block: ``uint8[m * 144]``, m super-blocks of one row.
        x: ``float32[m * 256]``.
    """
    return path_b_matmul(block[None, :], x)[0]


def path_b_matmul(rows: NDArray[np.uint8], x: F32) -> F32:
    """`path_b_dot` of each row of ``uint8[r, m * 144]``: ``float32[r]``."""
    n_rows = rows.shape[0]
    quants, scales, mins, d, dmin = unpack(rows, "Q4_K")
    blocks = quants.shape[0] // n_rows
    quants = quants.reshape(n_rows, blocks, 8, 32)
    scales = scales.reshape(n_rows, blocks, 8).astype(np.float32)
    mins = mins.reshape(n_rows, blocks, 8).astype(np.float32)
    d, dmin = d.reshape(n_rows, blocks), dmin.reshape(n_rows, blocks)
    q8, s8 = quantize_apr_q8k(x)
    q8 = q8.reshape(blocks, 8, 32)
    products = (quants * q8).sum(axis=3).astype(np.float32)
    sums = q8.sum(axis=2).astype(np.float32)
    total = np.zeros(n_rows, np.float32)
    for b in range(blocks):
        for s in range(8):
            scale = d[:, b] * scales[:, b, s] * s8[b]
            offset = dmin[:, b] * mins[:, b, s] * s8[b]
            total = total + (scale * products[:, b, s] - offset * sums[b, s])
    return total


def normalize(y: F32) -> F32:
    """The step between two links of the chain: divided by the root mean square (floor 1e-9), all in f32."""
    total = np.float32(0)
    for value in y:
        total = total + value * value
    rms = np.sqrt(total / np.float32(len(y)))
    return y / np.maximum(rms, np.float32(1e-9))


def relative_difference(a: float, b: float) -> float:
    """The published scalar metric: ``|a - b| / max(|a|, 1e-9)``, in f64."""
    return abs(float(a) - float(b)) / max(abs(float(a)), 1e-9)
