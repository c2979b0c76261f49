"""Row order of the q and k projections."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from driftscope.artifacts.tensor import TensorRef

F64 = NDArray[np.float64]


def projection(rows: int, columns: int, heads: int) -> TensorRef:
    return TensorRef("q", "q", (rows, columns), "F32", Path("none"), 0, rows * columns * 4, rope_heads=heads)


def rotate_split_half(x: F64, position: int) -> F64:
    """RoPE on ``[heads, head_dim]`` that pairs channel j with j + head_dim / 2 (transformers)."""
    half = x.shape[1] // 2
    angles = position * 10000.0 ** (-np.arange(half) / half)
    first, second = x[:, :half], x[:, half:]
    return np.concatenate(
        [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)],
        axis=1,
    )


def rotate_neighbours(x: F64, position: int) -> F64:
    """RoPE on ``[heads, head_dim]`` that pairs channel 2 j with 2 j + 1 (ggml, GGML_ROPE_TYPE_NORMAL)."""
    half = x.shape[1] // 2
    angles = position * 10000.0 ** (-np.arange(half) / half)
    out = np.empty_like(x)
    out[:, 0::2] = x[:, 0::2] * np.cos(angles) - x[:, 1::2] * np.sin(angles)
    out[:, 1::2] = x[:, 1::2] * np.cos(angles) + x[:, 0::2] * np.sin(angles)
    return out


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (3, 4), (9, 64), (2, 6)])
def test_row_order_by_its_definition(heads: int, head_dim: int) -> None:
    order = projection(heads * head_dim, 5, heads).row_order()
    assert order is not None
    for head in range(heads):
        for j in range(head_dim // 2):
            for s in range(2):
                canonical = head * head_dim + s * (head_dim // 2) + j
                assert order[canonical] == head * head_dim + 2 * j + s


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 8), (9, 3, 64)])
def test_stored_rows_with_neighbours_rotated_give_the_scores_of_canonical_rows(
    heads: int, kv_heads: int, head_dim: int
) -> None:
    """llama.cpp rotates the stored rows, transformers the canonical ones: attention is the same."""
    random = np.random.Generator(np.random.Philox(1))
    hidden = 24
    stored_q = random.standard_normal((heads * head_dim, hidden))
    stored_k = random.standard_normal((kv_heads * head_dim, hidden))
    q_order = projection(heads * head_dim, hidden, heads).row_order()
    k_order = projection(kv_heads * head_dim, hidden, kv_heads).row_order()
    assert q_order is not None
    assert k_order is not None
    x, y = random.standard_normal(hidden), random.standard_normal(hidden)

    def scores(q: F64, k: F64) -> F64:
        return np.sum(q * np.repeat(k, heads // kv_heads, axis=0), axis=1)

    def of_heads(rows: F64, vector: F64) -> F64:
        return np.sum(rows * vector, axis=1).reshape(-1, head_dim)

    as_stored = scores(
        rotate_neighbours(of_heads(stored_q, x), 11), rotate_neighbours(of_heads(stored_k, y), 4)
    )
    canonical = scores(
        rotate_split_half(of_heads(stored_q[q_order], x), 11),
        rotate_split_half(of_heads(stored_k[k_order], y), 4),
    )
    np.testing.assert_allclose(canonical, as_stored, rtol=1e-12)
    mixed = scores(rotate_split_half(of_heads(stored_q, x), 11), rotate_split_half(of_heads(stored_k, y), 4))
    assert not np.allclose(mixed, as_stored)
