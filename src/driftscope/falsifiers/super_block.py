"""Q4_K rows and the two arithmetics on many activations at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from driftscope.errors import InputError
from driftscope.kernels.activations import QuantizedActivation, quantize_activation
from driftscope.kernels.dequantize import dequantize
from driftscope.kernels.matmul import matmul_f32, matmul_quantized

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Rows = NDArray[np.uint8]

VALUES = 256
_SUB_BLOCKS = 8
_MINIMUM_OVER_SCALE = 7.5
"""A minimum of 7.5 quant steps centres quants 0..15 on zero, as the published real block nearly does
(7.982e-4 / 1.0335e-4 = 7.7)."""


def pack_rows(
    quants: NDArray[np.int64], scales: NDArray[np.int64], mins: NDArray[np.int64], d: float
) -> Rows:
    """Pack Q4_K super-blocks, ``dmin = 7.5 d``.

    Args:
        quants: ``int[n, 256]`` in 0..15.
        scales: ``int[n, 8]`` in 0..63.
        mins: ``int[n, 8]`` in 0..63.
        d: scale of the scales; kept as f16.

    Returns:
        ``uint8[n, 144]``, the layout of ggml's ``block_q4_K``.
    """
    n = quants.shape[0]
    head = np.array([d, _MINIMUM_OVER_SCALE * d], np.float16).view(np.uint8)
    low, high = (scales[:, :4], mins[:, :4]), (scales[:, 4:], mins[:, 4:])
    packed = [
        low[0] | ((high[0] >> 4) << 6),
        low[1] | ((high[1] >> 4) << 6),
        (high[0] & 15) | ((high[1] & 15) << 4),
    ]
    pairs = quants.reshape(n, 4, 2, 32)
    nibbles = (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(n, 128)
    parts = [np.broadcast_to(head, (n, 4)), *packed, nibbles]
    return np.concatenate([part.astype(np.uint8) for part in parts], axis=1)


def random_rows(random: np.random.Generator, count: int) -> Rows:
    """``uint8[count, 144]``: every scale, minimum and quant uniform; values centred on zero."""
    return pack_rows(
        random.integers(0, 16, (count, VALUES)),
        random.integers(1, 64, (count, _SUB_BLOCKS)),
        random.integers(1, 64, (count, _SUB_BLOCKS)),
        1e-4,
    )


def gaussian_rows(random: np.random.Generator, count: int) -> Rows:
    """``uint8[count, 144]``: one scale, quants of a normal variate; a random matrix of mean zero."""
    quants = np.clip(np.rint(7.5 + 2.7 * random.standard_normal((count, VALUES))), 0, 15)
    level = np.full((count, _SUB_BLOCKS), 32)
    return pack_rows(quants.astype(np.int64), level, level, 1e-4)


def path_a(rows: Rows, x: F32) -> F32:
    """Dequantize, then f32 products summed left to right: ``float32[n, r]``.

    Args:
        rows: ``uint8[r, 144]``.
        x: ``float32[n, 256]``.
    """
    return matmul_f32(x, dequantize(rows, "Q4_K"))


def path_a_reversed(rows: Rows, x: F32) -> F32:
    """`path_a` summed right to left: the same arithmetic in another order."""
    backwards = np.ascontiguousarray(dequantize(rows, "Q4_K")[:, ::-1])
    return matmul_f32(np.ascontiguousarray(x[:, ::-1]), backwards)


def path_b(rows: Rows, x: F32, activation: str) -> F32:
    """Quantize the activation, multiply in integers, scale in f32: ``float32[n, r]``.

    Args:
        rows: ``uint8[r, 144]``.
        x: ``float32[n, 256]``.
        activation: ``apr_q8k`` or ``q8_K``.
    """
    return matmul_quantized(x, rows, "Q4_K", activation=activation)


def swapped_nibbles(rows: Rows) -> Rows:
    """The same rows with the two halves of every quant byte exchanged: a plausible unpacking fault."""
    swapped = rows.copy()
    swapped[:, 16:] = (rows[:, 16:] >> 4) | (rows[:, 16:] << 4)
    return swapped


def predicted_energy(rows: Rows, x: F32, activation: str) -> F64:
    """Predict the energy of ``path_a - path_b`` from the activation's step alone: ``float64[n]``.

    A value rounded to a step s errs by s^2 / 12 on average (Bennett 1948), independently of the others, so
    that the energy over all rows is ``s^2 / 12 * sum of w^2``.

    Raises:
        InputError: the activation format does not have one step for a row of 256 values.
    """
    quantized = quantize_activation(x, activation)
    if not isinstance(quantized, QuantizedActivation) or quantized.block_size != VALUES:
        raise InputError(f"activation format {activation!r} has no blocks of {VALUES}; use apr_q8k or q8_K")
    step = quantized.d[:, 0].astype(np.float64)
    energy = np.square(dequantize(rows, "Q4_K").astype(np.float64)).sum()
    predicted: F64 = np.square(step) / 12.0 * energy
    return predicted
