"""The float64 ops in plain NumPy: the test oracle of `driftscope.kernels.float64`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from driftscope.kernels.reference.forward import soft_cap as capped
from driftscope.kernels.reference.forward import visible

F64 = NDArray[np.float64]


def matmul(x: F64, w: F64) -> F64:
    """``out[t, r] = sum over k of x[t, k] * w[r, k]``, k = 0 first, each operation rounded."""
    out = np.zeros((x.shape[0], w.shape[0]))
    for k in range(x.shape[1]):
        out = out + x[:, k, None] * w[None, :, k]
    return out


def scores(
    q: F64, k: F64, *, n_heads: int, n_kv_heads: int, scale: float, soft_cap: float | None = None
) -> F64:
    """``q k^T * scale``, capped where asked for, head by head side by side."""
    queries, keys = _heads(q, n_heads), np.repeat(_heads(k, n_kv_heads), n_heads // n_kv_heads, axis=0)
    found = np.concatenate(list(np.einsum("htc,hjc->htj", queries, keys) * scale), axis=1)
    return capped(found, soft_cap) if soft_cap else found


def softmax(scores: F64, *, n_heads: int, window: int | None = None) -> F64:
    """Softmax of each head's scores under the causal mask, zero where masked."""
    length = scores.shape[0]
    found = []
    for part in np.split(scores, n_heads, axis=1):
        masked = np.where(visible(length, window), part, -np.inf)
        weights = np.exp(masked - masked.max(axis=1, keepdims=True))
        found.append(weights / weights.sum(axis=1, keepdims=True))
    return np.concatenate(found, axis=1)


def weigh(weights: F64, v: F64, *, n_heads: int, n_kv_heads: int) -> F64:
    """Each head's weights times its values."""
    values = np.repeat(_heads(v, n_kv_heads), n_heads // n_kv_heads, axis=0)
    parts = np.split(weights, n_heads, axis=1)
    return np.concatenate([part @ rows for part, rows in zip(parts, values, strict=True)], axis=1)


def _heads(x: F64, n_heads: int) -> F64:
    return np.moveaxis(x.reshape(x.shape[0], n_heads, -1), 1, 0)
