"""What a transformer layer does between its matmuls, in plain NumPy and float64: the test oracle."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


def rms_norm(x: F64, weight: F64, eps: float) -> F64:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last ``len(weight)`` channels of ``[n, channels]``."""
    heads = x.reshape(x.shape[0], -1, weight.shape[0])
    scaled = heads / np.sqrt(np.square(heads).mean(axis=-1, keepdims=True) + eps) * weight
    return scaled.reshape(x.shape)


def rope(
    x: F64,
    frequencies: F64,
    positions: NDArray[np.int64],
    *,
    scale: float = 1.0,
    interleaved: bool = False,
    head_dim: int | None = None,
) -> F64:
    """Rotate every head of ``[n, heads * head_dim]`` by ``position * frequency`` and stretch it by `scale`.

    The pairs are split halves of what is turned, or neighbours where `interleaved`; what is behind them in a
    head stays.
    """
    half = frequencies.shape[0]
    heads = x.reshape(x.shape[0], -1, head_dim or 2 * half).copy()
    n, count = heads.shape[:2]
    split = (n, count, half, 2) if interleaved else (n, count, 2, half)
    axis = 3 if interleaved else 2
    first, second = np.moveaxis(heads[:, :, : 2 * half].reshape(split), axis, 0)
    turn = scale * np.exp(1j * positions[:, None] * frequencies)
    turned = (first + 1j * second) * turn[:, None, :]
    heads[:, :, : 2 * half] = np.stack([turned.real, turned.imag], axis=axis).reshape(n, count, 2 * half)
    return heads.reshape(x.shape)


def silu(gate: F64) -> F64:
    """``x / (1 + exp(-x))``."""
    return gate / (1.0 + np.exp(-gate))


def swiglu(gate: F64, up: F64) -> F64:
    """``silu(gate) * up``."""
    return silu(gate) * up


def gelu(gate: F64) -> F64:
    """``x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))``."""
    return 0.5 * gate * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (gate + 0.044715 * gate**3)))


def geglu(gate: F64, up: F64) -> F64:
    """``gelu(gate) * up``."""
    return gelu(gate) * up


def soft_cap(x: F64, cap: float) -> F64:
    """``cap tanh(x / cap)``."""
    return cap * np.tanh(x / cap)


def visible(length: int, window: int | None) -> NDArray[np.bool_]:
    """Which key (column) each query (row) of a sequence sees."""
    query, key = np.indices((length, length))
    return (key <= query) & (True if window is None else key > query - window)


def attention(
    q: F64,
    k: F64,
    v: F64,
    starts: NDArray[np.int64],
    *,
    n_heads: int,
    n_kv_heads: int,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> F64:
    """Causal grouped-query attention, sequence by sequence; shapes as in `driftscope.kernels.forward`."""
    out = np.empty_like(q)
    head_dim = q.shape[1] // n_heads
    for begin, end in itertools.pairwise(starts):
        mask = visible(int(end - begin), window)
        for head in range(n_heads):
            kv_head = head // (n_heads // n_kv_heads)
            columns = slice(head * head_dim, (head + 1) * head_dim)
            kv_columns = slice(kv_head * head_dim, (kv_head + 1) * head_dim)
            scores = q[begin:end, columns] @ k[begin:end, kv_columns].T * scale
            if soft_cap:
                scores = soft_cap * np.tanh(scores / soft_cap)
            scores = np.where(mask, scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            out[begin:end, columns] = weights @ v[begin:end, kv_columns]
    return out
