"""Attention of the newest tokens of sequences over the keys and values that are kept of the earlier ones.

The same arithmetic in the same order as `driftscope.kernels.forward.attention`: a token's result has the
same bits, whether its sequence was run at once or token by token.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from driftscope.kernels.forward import (
    KV_TYPES,
    _first_key,
    _round_row_to_f16,
    _score_row,
    _softmax_row,
    _weighted_sum,
    to_f16,
)
from driftscope.kernels.jit import kernel
from driftscope.kernels.parallel import over_rows

F32 = NDArray[np.float32]


class KeyValueCache:
    """Keys and values of one layer.

    Attributes:
        keys: ``float32[n_slots, n_kv_heads, head_dim, capacity]``, channels first, so that the keys of a
            channel lie side by side.
        values: ``float32[n_slots, n_kv_heads, capacity, head_dim]``.
    """

    def __init__(self, n_slots: int, n_kv_heads: int, head_dim: int, capacity: int) -> None:
        self.keys: F32 = np.zeros((n_slots, n_kv_heads, head_dim, capacity), dtype=np.float32)
        self.values: F32 = np.zeros((n_slots, n_kv_heads, capacity, head_dim), dtype=np.float32)


def cached_attention(
    q: F32,
    k: F32,
    v: F32,
    starts: NDArray[np.int64],
    cache: KeyValueCache,
    slots: NDArray[np.int64],
    lengths: NDArray[np.int64],
    *,
    n_heads: int,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    kv_type: str = "f32",
    threads: int = 1,
) -> F32:
    """Put the keys and values of new tokens into the cache, and attend from these tokens.

    Args:
        q: ``float32[n, n_heads * head_dim]`` of the new tokens of all sequences, after RoPE.
        k: ``float32[n, n_kv_heads * head_dim]``, after RoPE.
        v: ``float32[n, n_kv_heads * head_dim]``.
        starts: ``int64[n_sequences + 1]``, first new token of each sequence, then n.
        cache: of the layer; changed in place.
        slots: ``int64[n_sequences]``, the cache's slot of each sequence, each at most once.
        lengths: ``int64[n_sequences]``, tokens of each sequence that are in the cache.
        n_heads: number of query heads.
        scale: as in `driftscope.kernels.forward.attention`, like all that follows.
        window: see there.
        soft_cap: see there.
        kv_type: see there; ``f16`` rounds what the cache holds.
        threads: number of threads; the result does not depend on it.

    Returns:
        ``float32[n, n_heads * head_dim]``.

    Raises:
        ValueError: an unknown `kv_type`, or a sequence that is longer than the cache.
    """
    if kv_type not in KV_TYPES:
        raise ValueError(f"kv_type {kv_type!r}; expected one of {', '.join(KV_TYPES)}")
    capacity = cache.keys.shape[3]
    if int((lengths + np.diff(starts)).max()) > capacity:
        raise ValueError(f"a sequence is longer than the cache of {capacity} tokens")
    if kv_type == "f16":
        q, k, v = to_f16(q), to_f16(k), to_f16(v)
    q, k, v = np.ascontiguousarray(q), np.ascontiguousarray(k), np.ascontiguousarray(v)
    _append(k, v, starts, slots, lengths, cache.keys, cache.values)
    out = np.empty(q.shape, dtype=np.float32)
    factor, cap, half = np.float32(scale), float(soft_cap or 0.0), kv_type == "f16"
    keys, values = cache.keys, cache.values

    def work(first: int, end: int) -> None:
        _attend(
            q, keys, values, starts, slots, lengths, n_heads, factor, window or 0, cap, half, first, end, out
        )

    over_rows(work, n_heads * len(slots), threads=threads)
    return out


@kernel(
    "void(R(float32, 2), R(float32, 2), R(int64, 1), R(int64, 1), R(int64, 1), "
    "float32[:, :, :, ::1], float32[:, :, :, ::1])"
)
def _append(k, v, starts, slots, lengths, keys, values):  # type: ignore[no-untyped-def]
    n_kv_heads, head_dim = keys.shape[1], keys.shape[2]
    for s in range(slots.shape[0]):
        for i in range(starts[s], starts[s + 1]):
            j = lengths[s] + i - starts[s]
            for head in range(n_kv_heads):
                for c in range(head_dim):
                    keys[slots[s], head, c, j] = k[i, head * head_dim + c]
                    values[slots[s], head, j, c] = v[i, head * head_dim + c]


@kernel(
    "void(R(float32, 2), R(float32, 4), R(float32, 4), R(int64, 1), R(int64, 1), R(int64, 1), "
    "int64, float32, int64, float64, boolean, int64, int64, float32[:, ::1])"
)
def _attend(  # type: ignore[no-untyped-def]
    q, keys, values, starts, slots, lengths, n_heads, scale, window, cap, f16, first_unit, end_unit, out
):
    # A unit is one head of one sequence.
    n_kv_heads, head_dim, capacity = keys.shape[1], keys.shape[2], keys.shape[3]
    scores = np.empty(capacity, dtype=np.float32)
    weights = np.empty(capacity, dtype=np.float32)
    bits = weights.view(np.uint32)
    for unit in range(first_unit, end_unit):
        s, head = unit // n_heads, unit % n_heads
        kv_head = head // (n_heads // n_kv_heads)
        left, right = head * head_dim, (head + 1) * head_dim
        kt, rows = keys[slots[s], kv_head], values[slots[s], kv_head]
        for i in range(starts[s], starts[s + 1]):
            position = lengths[s] + i - starts[s]
            first = _first_key(position, window)
            _score_row(q[i, left:right], kt, first, position + 1, scale, cap, scores)
            _softmax_row(scores, first, position + 1, weights)
            if f16:
                _round_row_to_f16(weights, bits, first, position + 1)
            _weighted_sum(weights, rows, first, position + 1, out[i, left:right])
