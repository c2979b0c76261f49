"""The float64 ops against plain NumPy, bit for bit where the order says so, and against exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from driftscope.errors import InputError
from driftscope.kernels import float64
from driftscope.kernels.dequantize import dequantize
from driftscope.kernels.formats import row_bytes
from driftscope.kernels.reference import float64 as plain
from driftscope.kernels.reference import forward as oracle


def random(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 14),
    r=st.integers(0, 37),
    k=st.integers(1, 600),
    seed=st.integers(0, 99),
    wide=st.booleans(),
)
def test_products_are_summed_in_order(n: int, r: int, k: int, seed: int, wide: bool) -> None:
    g = random(seed)
    x, w = g.standard_normal((n, k)), g.standard_normal((r, k))
    w = w if wide else w.astype(np.float32)
    assert np.array_equal(float64.matmul(x, w), plain.matmul(x, w.astype(np.float64)))


def test_a_product_does_not_depend_on_threads_or_on_other_rows() -> None:
    g = random(1)
    x, w = g.standard_normal((9, 700)), g.standard_normal((133, 700)).astype(np.float32)
    whole = float64.matmul(x, w)
    assert np.array_equal(float64.matmul(x, w, threads=3), whole)
    assert np.array_equal(float64.matmul(x[4:5], w[50:61]), whole[4:5, 50:61])


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "Q4_1", "Q4_K", "Q6_K", "IQ4_XS"])
def test_stored_rows_are_their_values(dtype: str) -> None:
    g = random(2)
    raw = g.integers(0, 60, (45, row_bytes(dtype, 512)), dtype=np.uint8)
    x = g.standard_normal((5, 512)).astype(np.float32)
    found = float64.matmul_stored(x, raw, dtype)
    assert np.array_equal(found, float64.matmul(x, dequantize(raw, dtype)))
    assert np.array_equal(found, float64.matmul_stored(x, raw, dtype, threads=2))


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="rows of 4 values"):
        float64.matmul(np.ones((2, 3)), np.ones((2, 4)))


def test_norm_and_rope_are_the_oracles() -> None:
    g = random(3)
    x, weight = g.standard_normal((7, 96)), g.standard_normal(32).astype(np.float32)
    assert np.allclose(
        float64.rms_norm(x, weight, 1e-5), oracle.rms_norm(x, weight, 1e-5), rtol=1e-14, atol=0
    )
    frequencies = 10000.0 ** (-np.arange(16) / 16)
    positions = np.array([0, 1, 2, 3, 700, 1, 4095])
    cosine, sine = float64.rope_tables(frequencies, 4096, scale=1.25)
    expected = oracle.rope(x, frequencies, positions, scale=1.25)
    assert np.allclose(float64.rope(x, cosine, sine, positions), expected, rtol=0, atol=1e-12)


def test_a_head_that_is_turned_in_part() -> None:
    x, positions = random(6).standard_normal((4, 3 * 20)), np.array([0, 3, 1, 9])
    frequencies = 100.0 ** (-np.arange(6) / 6)
    found = float64.rope(x, *float64.rope_tables(frequencies, 10), positions, head_dim=20)
    expected = oracle.rope(x, frequencies, positions, head_dim=20)
    assert np.allclose(found, expected, rtol=0, atol=1e-14)
    assert np.array_equal(found.reshape(4, 3, 20)[:, :, 12:], x.reshape(4, 3, 20)[:, :, 12:])


def test_angles_are_not_rounded_to_float32() -> None:
    frequency = np.array([1.0, 0.1, 0.012345678901234])
    cosine, sine = float64.rope_tables(frequency, 3001)
    for position in (1, 17, 3000):
        angle = [float(Fraction(float(f)) * position) for f in frequency]
        assert np.allclose(cosine[position], np.cos(angle), rtol=0, atol=1e-14)
        assert np.allclose(sine[position], np.sin(angle), rtol=0, atol=1e-14)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("cap", [None, 0.75])
def test_attention_in_steps(window: int | None, cap: float | None) -> None:
    g = random(4)
    q, k, v = (g.standard_normal((11, heads * 8)) for heads in (6, 2, 2))
    heads = {"n_heads": 6, "n_kv_heads": 2}
    scores = float64.scores(q, k, scale=8**-0.5, soft_cap=cap, **heads)
    assert np.allclose(scores, plain.scores(q, k, scale=8**-0.5, soft_cap=cap, **heads), rtol=0, atol=1e-14)
    weights = float64.softmax(scores, n_heads=6, window=window)
    assert np.allclose(weights, plain.softmax(scores, n_heads=6, window=window), rtol=1e-14, atol=0)
    found = float64.weigh(weights, v, **heads)
    assert np.allclose(found, plain.weigh(weights, v, **heads), rtol=0, atol=1e-14)
    whole = oracle.attention(q, k, v, np.array([0, 11]), scale=8**-0.5, window=window, soft_cap=cap, **heads)
    assert np.allclose(found, whole, rtol=0, atol=1e-14)
    for threads in (2, 5):
        assert np.array_equal(float64.softmax(scores, n_heads=6, window=window, threads=threads), weights)
        assert np.array_equal(float64.weigh(weights, v, threads=threads, **heads), found)


def test_softmax_of_scores_that_were_masked() -> None:
    scores = np.array([[1.0, 0.0], [2.0, -np.inf]])
    assert np.array_equal(float64.softmax(scores, n_heads=1), [[1.0, 0.0], [1.0, 0.0]])


def test_softmax_keeps_what_is_not_finite() -> None:
    scores = np.array([[np.nan, 0.0], [0.0, 1.0]])
    found = float64.softmax(scores, n_heads=1)
    assert np.isnan(found[0, 0])
    assert np.isfinite(found[1]).all()


def test_silu() -> None:
    x = np.concatenate([random(5).standard_normal(1000) * 20, [0.0, 700.0, -700.0]])
    assert np.allclose(float64.silu(x), x * special.expit(x), rtol=1e-14, atol=1e-300)


def test_gelu_and_soft_cap() -> None:
    x = np.concatenate([random(7).standard_normal(1000) * 8, [0.0, 1e6, -1e6]])
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    assert np.allclose(float64.gelu(x), x * special.expit(2 * inner), rtol=1e-12, atol=1e-300)
    assert np.allclose(float64.gelu(x), oracle.gelu(x), rtol=1e-9, atol=1e-13)
    assert np.allclose(float64.capped(x, 5.0), oracle.soft_cap(x, 5.0), rtol=1e-14, atol=0)
