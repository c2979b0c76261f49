"""The propagated error against plain NumPy over the same values."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from driftscope.analysis.divergence import compare_tap, scopes_of, token_sums


def taps(tokens: int = 7, channels: int = 33) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A tap and the same with an error and another scale."""
    random = np.random.Generator(np.random.Philox(1))
    a = random.standard_normal((tokens, channels), dtype=np.float32) + np.float32(0.3)
    noise = random.standard_normal((tokens, channels), dtype=np.float32)
    return a, np.float32(1.1) * a + np.float32(0.01) * noise


def test_every_scope_agrees_with_numpy() -> None:
    a, b = taps()
    rows = compare_tap(a, b, [("p", slice(0, 4)), ("q", slice(4, 7))])
    parts = {
        ("p", "all", -1): slice(0, 4),
        ("p", "last", -1): slice(3, 4),
        ("p", "all-but-first", -1): slice(1, 4),
        **{("p", "token", i): slice(i, i + 1) for i in range(4)},
        ("q", "all", -1): slice(4, 7),
        ("q", "last", -1): slice(6, 7),
        ("q", "all-but-first", -1): slice(5, 7),
        **{("q", "token", i): slice(4 + i, 5 + i) for i in range(3)},
    }
    found = {(row["prompt"], row["scope"], row["position"]): row for row in rows}
    assert found.keys() == parts.keys()
    for key, part in parts.items():
        x, y = a[part].astype(np.float64).ravel(), b[part].astype(np.float64).ravel()
        row = found[key]
        assert row["token_count"] == part.stop - part.start
        assert row["count"] == row["compared_count"] == x.size
        assert row["nmse"] == pytest.approx(np.square(y - x).sum() / np.square(x).sum(), rel=1e-12)
        relative = np.linalg.norm(y - x) / np.linalg.norm(x)
        assert row["relative_l2"] == pytest.approx(relative, rel=1e-12)
        cosine = np.dot(x, y) / np.linalg.norm(x) / np.linalg.norm(y)
        assert row["cosine_similarity"] == pytest.approx(cosine, rel=1e-12)
        assert row["max_abs_diff"] == np.abs(y - x).max()
        assert row["std_ratio"] == pytest.approx(y.std(ddof=1) / x.std(ddof=1), rel=1e-9)


def test_equal_taps_have_no_error() -> None:
    a, _ = taps()
    for row in compare_tap(a, a, [("p", slice(0, 7))]):
        assert (row["nmse"], row["max_abs_diff"]) == (0.0, 0.0)
        assert row["std_ratio"] == 1.0
        assert row["cosine_similarity"] == pytest.approx(1.0, rel=1e-15)


def test_values_that_are_not_finite_are_counted_and_left_out() -> None:
    a, b = taps()
    b[2, 5], a[2, 6], b[0, 0] = np.nan, np.inf, -np.inf
    row = compare_tap(a, b, [("p", slice(0, 7))])[0]
    finite = np.isfinite(a) & np.isfinite(b)
    x, y = a[finite].astype(np.float64), b[finite].astype(np.float64)
    assert row["count"] - row["compared_count"] == 3
    assert row["nmse"] == pytest.approx(np.square(y - x).sum() / np.square(x).sum(), rel=1e-12)


def test_nothing_finite_is_undefined_and_not_zero() -> None:
    a, b = taps(2, 4)
    row = compare_tap(a, np.full_like(b, np.nan), [("p", slice(0, 2))])[0]
    assert row["compared_count"] == 0
    figures = ("nmse", "relative_l2", "cosine_similarity", "max_abs_diff", "std_ratio")
    assert [row[name] for name in figures] == [None] * 5


def test_an_error_of_nothing_is_undefined() -> None:
    zero, one = np.zeros((1, 4), np.float32), np.ones((1, 4), np.float32)
    assert compare_tap(zero, one, [("p", slice(0, 1))])[0]["nmse"] is None
    assert compare_tap(zero, zero, [("p", slice(0, 1))])[0]["nmse"] == 0.0


def test_one_token_has_no_scope_without_the_first() -> None:
    assert [scope for scope, _, _ in scopes_of(1)] == ["all", "last", "token"]
    assert len(list(scopes_of(5))) == 3 + 5


def test_sums_are_in_double_precision() -> None:
    a = np.full((1, 1000), 1e4, np.float32)
    a[0, 1:] = 1e-4
    exact = float(np.float32(1e4)) ** 2 + 999 * float(np.float32(1e-4)) ** 2
    assert token_sums(a, a).aa[0] == pytest.approx(exact, rel=1e-15)
