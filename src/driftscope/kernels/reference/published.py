"""The published investigation's fixtures and its arithmetics, value by value.

Every operation is one f32 operation in the published programs' order, so that every published digit comes
out. Nothing is drawn at random: all fixtures are small formulas.

Where the publications do not say what their digits need, this was found by trying what a program could do:

- The activation is multiplied by the reciprocal of its scale, not divided by it. They part at a near tie of
  token 4 of the multi-token chain: 0.023573 % (published) against 0.021740 %.
- Path B sums as AVX2 code does: integer sums in eight lanes, scaled once, lanes added half to half; minima
  in four lanes. In the order that the publication states, terms added one by one, the scale fixture is up to
  3 units in the last place away. Both orders give the bits of the one-block fixture.
- The scale 0.001 is the bytes ``10 14`` (0.00099182), as 0.05 is ``33 29`` (0.040619): of all f16 values from
  0.00086 to 0.00146 three give the published digits, and this one is the nearest.
- The eight lanes of the SIMD dot are added first to last; added half to half, they give ``0x44191e71``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.kernels.reference.dequantize import dequantize, unpack

F32 = NDArray[np.float32]

VALUES = 256
CHAIN_ROWS = 256
CHAIN_DEPTH = 5
TOKENS = 7

D_SCALES = {
    "0.001": b"\x10\x14",
    "0.01": b"\x1f\x21",
    "0.05": b"\x33\x29",
    "0.1": b"\x66\x2e",
    "0.5": b"\x00\x38",
    "1": b"\x00\x3c",
    "10": b"\x00\x49",
}
"""Scales of the d-scale fixture as published, and the little-endian f16 that stands for them."""

_DRIFT = 0.00077


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

    scale = max|x| / 127, or 1/127 where max|x| <= 1e-10; quant = x * (1 / scale) rounded half away from
    zero, clamped to [-128, 127]. It is not ggml's q8_K, which keeps the sign of the largest value.
    """
    blocks = np.asarray(x, np.float32).reshape(-1, VALUES)
    largest = np.abs(blocks).max(axis=1)
    scale = np.where(largest > np.float32(1e-10), largest / np.float32(127), np.float32(1) / np.float32(127))
    ratio = blocks * (np.float32(1) / scale)[:, None]
    whole = np.trunc(ratio)
    away = whole + np.where(np.abs(ratio - whole) >= np.float32(0.5), np.copysign(np.float32(1), ratio), 0)
    return np.clip(away, -128, 127).astype(np.int64), scale.astype(np.float32)


def path_b_dot(block: NDArray[np.uint8], x: F32) -> np.float32:
    """Quantize the activation to ``apr_q8k``, multiply in integers, accumulate as the digits need.

    Args:
        block: ``uint8[m * 144]``, m super-blocks of one row.
        x: ``float32[m * 256]``.
    """
    return path_b_matmul(block[None, :], x)[0]


def path_b_matmul(rows: NDArray[np.uint8], x: F32) -> F32:
    """`path_b_dot` of each row of ``uint8[r, m * 144]``: ``float32[r]``.

    Of a super-block, lane j of eight sums ``sc * q4 * q8`` over four neighbours of each 32 values in
    integers; each lane is multiplied with ``d * s8`` in f32 and the lanes are added half to half. Minima:
    four lanes of ``m * sum(q8)`` over two times 32 values, multiplied with ``dmin * s8``, added half to
    half, taken off.
    """
    parts = _integer_parts(rows, x)
    total = np.zeros(rows.shape[0], np.float32)
    for b, (quants, scales, mins, d, dmin, q8, s8) in enumerate(parts):
        lanes = (quants * q8).reshape(-1, 8, 8, 4).sum(axis=3) * scales[:, :, None]
        sums = (mins * q8.sum(axis=1)).reshape(-1, 4, 2).sum(axis=2)
        block = _halves((d * s8)[:, None] * lanes.sum(axis=1).astype(np.float32))
        block = block - _halves((dmin * s8)[:, None] * sums.astype(np.float32))
        total = block if b == 0 else total + block
    return total


def path_b_stated_matmul(rows: NDArray[np.uint8], x: F32) -> F32:
    """Path B in the order that the publication states: ``float32[r]``.

    For each 64 values, the low nibbles and then the high ones:
    ``acc += (d * sc * s8) * sum(q4 * q8) - (dmin * m * s8) * sum(q8)``, in f32.
    """
    total = np.zeros(rows.shape[0], np.float32)
    for quants, scales, mins, d, dmin, q8, s8 in _integer_parts(rows, x):
        products = (quants * q8).sum(axis=2).astype(np.float32)
        sums = q8.sum(axis=1).astype(np.float32)
        for s in range(8):
            scale = d * scales[:, s].astype(np.float32) * s8
            offset = dmin * mins[:, s].astype(np.float32) * s8
            total = total + (scale * products[:, s] - offset * sums[s])
    return total


def _integer_parts(rows: NDArray[np.uint8], x: F32) -> Iterator[tuple[Any, ...]]:
    """Of each super-block: quants ``[r, 8, 32]``, scales and mins ``[r, 8]``, d and dmin ``[r]``, q8, s8."""
    n = rows.shape[0]
    quants, scales, mins, d, dmin = unpack(rows, "Q4_K")
    q8, s8 = quantize_apr_q8k(x)
    blocks = len(s8)
    quants, scales, mins = (
        part.reshape(n, blocks, 8, -1).astype(np.int64) for part in (quants, scales, mins)
    )
    d, dmin = d.reshape(n, blocks), dmin.reshape(n, blocks)
    for b in range(blocks):
        yield (
            *(quants[:, b], scales[:, b, :, 0], mins[:, b, :, 0], d[:, b], dmin[:, b]),
            *(q8[b].reshape(8, 32), s8[b]),
        )


def _halves(lanes: F32) -> F32:
    """Sum of the last axis, half added to half, in f32."""
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


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


def chain(product: Callable[[NDArray[np.uint8], F32], F32], token: int = 0) -> F32:
    """Five chained matrices, `normalize` after each, from the activation of a token: ``float32[256]``.

    Args:
        product: `path_a_matmul`, `path_b_matmul` or `path_b_stated_matmul`.
        token: 0 for the chain fixture, 0 to 6 for the multi-token fixture.
    """
    x = activation(token)
    for depth in range(CHAIN_DEPTH):
        x = normalize(product(chained_tensor(depth), x))
    return x


def vector_difference(a: F32, b: F32) -> float:
    """The published vector metric: ``||a - b|| / max(||a||, 1e-9)``, in f64."""
    exact = a.astype(np.float64)
    error = float(np.sqrt(np.square(exact - b).sum()))
    return error / max(float(np.sqrt(np.square(exact).sum())), 1e-9)


def dot_factors() -> tuple[F32, F32]:
    """Two ``float32[128]``, the fixture of the SIMD and the scalar dot, evaluated as written."""
    i = np.arange(128)
    whole = i.astype(np.float32)
    a = (i - 64).astype(np.float32) * np.float32(0.1) + (i % 7).astype(np.float32) * np.float32(0.013)
    b = (whole * np.float32(0.7) - np.float32(50)) * np.float32(0.05)
    return a, b + (i % 11).astype(np.float32) * np.float32(0.011)


def scalar_dot(a: F32, b: F32) -> F32:
    """Products summed first to last, each operation rounded: ``float32[..., n]`` to ``float32[...]``."""
    total = np.zeros(a.shape[:-1], np.float32)
    for k in range(a.shape[-1]):
        total = total + a[..., k] * b[..., k]
    return total


def simd_dot(a: F32, b: F32) -> F32:
    """Eight lanes of fused multiply-adds, lane ``k mod 8`` in order of k, then added first lane to last."""
    lanes = np.zeros((*a.shape[:-1], 8), np.float32)
    for k in range(0, a.shape[-1], 8):
        lanes = fused_multiply_add(a[..., k : k + 8], b[..., k : k + 8], lanes)
    total = lanes[..., 0]
    for lane in range(1, 8):
        total = total + lanes[..., lane]
    return total


def fused_multiply_add(a: F32, b: F32, c: F32) -> F32:
    """``a * b + c`` rounded once, of finite values far from overflow and underflow.

    The product is exact in f64. The sum is rounded to odd (Boldo and Melquiond 2008), so that rounding it
    again to f32 is the same as rounding once.
    """
    product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + c
    virtual = total - product
    rest = (product - (total - virtual)) + (c - virtual)
    bits = total.view(np.int64)
    up = (rest > 0) == (total > 0)
    inexact = (rest != 0) & (bits % 2 == 0)
    return (bits + np.where(inexact, np.where(up, 1, -1), 0)).view(np.float64).astype(np.float32)


def softmax(x: F32) -> F32:
    """``exp(x - max)``, rounded to f32, over their sum, first to last in f32."""
    powers = np.exp((x - x.max()).astype(np.float64)).astype(np.float32)
    total = np.float32(0)
    for power in powers:
        total = total + power
    return powers / total


def softmax_drift() -> tuple[float, float]:
    """L1 drift of the softmax fixture's logits and of its probabilities, each relative."""
    before = np.array([-1.5, 0.5, -0.8, 10.0, 1.2, -0.3, 0.7], np.float32)
    after = before.copy()
    after[3] += np.float32(0.0077)

    def drift(a: F32, b: F32) -> float:
        return float(np.abs(b.astype(np.float64) - a).sum() / np.abs(a.astype(np.float64)).sum())

    return drift(before, after), drift(softmax(before), softmax(after))


def rms_norm(x: F32, eps: float = 1e-6) -> F32:
    """``x / sqrt(mean(x^2) + eps)``, squares summed in order, all in f32."""
    total = np.float32(0)
    for value in x:
        total = total + value * value
    return x / np.sqrt(total / np.float32(len(x)) + np.float32(eps))


def rms_norm_drift() -> tuple[float, float]:
    """Vector drift of the RMSNorm fixture before the norm and behind it.

    Each of the activation's values is moved by 0.077 % of itself, up where ``(13 i + 7) mod 17 < 8``.
    """
    before = activation()
    i = np.arange(VALUES)
    sign = np.where((13 * i + 7) % 17 < 8, 1, -1).astype(np.float32)
    after = before + sign * np.abs(before) * np.float32(_DRIFT)
    return vector_difference(before, after), vector_difference(rms_norm(before), rms_norm(after))


def rope_drift(position_q: int = 0, position_k: int = 1) -> tuple[float, float]:
    """Relative drift of the RoPE fixture's query and of its score with the key; head of 64, theta 10000."""
    i = np.arange(64)
    ramp = (i - 32).astype(np.float32)
    q = ramp * np.float32(0.05) + (i % 5).astype(np.float32) * np.float32(0.02)
    k = ramp * np.float32(0.04) + (i % 7).astype(np.float32) * np.float32(0.015)
    moved = q * np.float32(1 + _DRIFT)
    frequencies = (10000.0 ** (-np.arange(0, 64, 2) / 64)).astype(np.float32)

    def rotated(x: F32, position: int) -> F32:
        angles = np.float32(position) * frequencies
        cosine, sine = (f(angles.astype(np.float64)).astype(np.float32) for f in (np.cos, np.sin))
        a, b = x[:32], x[32:]
        return np.concatenate([a * cosine - b * sine, b * cosine + a * sine])

    key = rotated(k, position_k)
    before, after = (float(scalar_dot(rotated(x, position_q), key)) for x in (q, moved))
    return vector_difference(q, moved), relative_difference(before, after)


def matmul_fixture(large: bool = True) -> tuple[F32, F32]:
    """``x`` and ``w`` of the determinism fixtures: 4 rows of 128 by 512 outputs, or 1 row by 64 outputs.

    The formulas run over the flat index of ``x[rows, 128]`` and of ``w[outputs, 128]``.
    """
    rows, outputs = (4, 512) if large else (1, 64)
    i, j = np.arange(rows * 128), np.arange(outputs * 128)
    if large:
        x = ((i % 17) - 8).astype(np.float32) * np.float32(0.1)
        w = ((31 * j) % 23 - 11).astype(np.float32) * np.float32(0.05)
    else:
        x = ((i % 13) - 6).astype(np.float32) * np.float32(0.1)
        w = ((23 * j) % 19 - 9).astype(np.float32) * np.float32(0.05)
    return x.reshape(rows, 128), w.reshape(outputs, 128)
