from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driftscope.kernels.dequantize import dequantize
from driftscope.kernels.matmul import matmul_f32, matmul_f32_quantized
from driftscope.kernels.reference import published


def bits(value: np.float32) -> int:
    return int(np.float32(value).view(np.uint32))


def test_block_ends() -> None:
    values = dequantize(published.block_bytes()[None, :], "Q4_K")[0]
    assert values[0] == 10.75
    assert values[255] == 1.25


def test_path_a() -> None:
    block, x = published.block_bytes(), published.activation()
    assert bits(published.path_a_dot(block, x)) == 0xC69384E3
    assert bits(matmul_f32_quantized(x[None, :], block[None, :], "Q4_K")[0, 0]) == 0xC69384E3


def test_path_b() -> None:
    block, x = published.block_bytes(), published.activation()
    b = published.path_b_dot(block, x)
    assert bits(b) == 0xC693A21E
    percent = 100 * published.relative_difference(published.path_a_dot(block, x), b)
    assert percent == pytest.approx(0.0774, abs=5e-5)


def test_path_b_in_the_stated_order_too() -> None:
    block, x = published.block_bytes(), published.activation()
    assert bits(published.path_b_stated_matmul(block[None, :], x)[0]) == 0xC693A21E


PER_TOKEN = ["0.439143", "0.246297", "0.020914", "0.028250", "0.023573", "0.024674", "0.020246"]


@pytest.fixture(scope="module")
def chains() -> tuple[np.ndarray, np.ndarray]:
    """Ends of the chain on path A and on path B, ``[7, 256]``."""
    paths = (published.path_a_matmul, published.path_b_matmul)
    a, b = (np.stack([published.chain(path, token) for token in range(published.TOKENS)]) for path in paths)
    return a, b


def percents(chains: tuple[np.ndarray, np.ndarray]) -> list[float]:
    return [100 * published.vector_difference(a, b) for a, b in zip(*chains, strict=True)]


def test_chain_of_five_for_each_token(chains: tuple[np.ndarray, np.ndarray]) -> None:
    assert [f"{value:.6f}" for value in percents(chains)] == PER_TOKEN
    assert f"{percents(chains)[0]:.4f}" == "0.4391"


def test_figures_over_the_tokens(chains: tuple[np.ndarray, np.ndarray]) -> None:
    values = np.array(percents(chains))
    assert f"{values.mean():.6f}" == "0.114728"
    assert f"{values.max() / values.min():.2f}" == "21.69"
    assert f"{values.mean() / values[0]:.4f}" == "0.2613"
    a, b = (ends.astype(np.float64).std(axis=0).mean() for ends in chains)
    assert (f"{a:.6f}", f"{b:.6f}") == ("0.033416", "0.032228")
    assert f"{100 * (a / b - 1):.2f}" == "3.69"


def test_token_4_parts_the_reciprocal_from_the_quotient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes it is one near tie: 63.5 times the scale."""
    a = published.chain(published.path_a_matmul, 4)
    reciprocal = published.quantize_apr_q8k

    def quotient(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        _, scale = reciprocal(x)
        ratio = x / scale[0]
        whole = np.trunc(ratio)
        away = whole + np.where(np.abs(ratio - whole) >= 0.5, np.sign(ratio), 0)
        return away.astype(np.int64)[None, :], scale

    monkeypatch.setattr(published, "quantize_apr_q8k", quotient)
    percent = 100 * published.vector_difference(a, published.chain(published.path_b_matmul, 4))
    assert f"{percent:.6f}" == "0.021740"


D_SCALE_PERCENTS = {
    "0.001": "0.091873",
    "0.01": "0.091873",
    "0.05": "0.091924",
    "0.1": "0.092017",
    "0.5": "0.091932",
    "1": "0.091932",
    "10": "0.091966",
}


@pytest.mark.parametrize("d", list(D_SCALE_PERCENTS))
def test_scale_alone(d: str) -> None:
    """The relative difference hardly depends on d when there are no minima."""
    block, x = published.block_bytes(d=published.D_SCALES[d], dmin=b"\x00\x00"), published.activation()
    a, b = published.path_a_dot(block, x), published.path_b_dot(block, x)
    assert f"{100 * published.relative_difference(a, b):.6f}" == D_SCALE_PERCENTS[d]


def test_only_odd_bytes_give_the_figure_of_the_smallest_scale() -> None:
    """f16(0.001) is 0x1419; its figure is another, whatever the order of the sums."""
    x, nearest = published.activation(), []
    for stored in range(0x1300, 0x1600):
        block = published.block_bytes(d=stored.to_bytes(2, "little"), dmin=b"\x00\x00")
        a, b = published.path_a_dot(block, x), published.path_b_dot(block, x)
        if f"{100 * published.relative_difference(a, b):.6f}" == "0.091873":
            nearest.append(stored)
    assert nearest == [0x1394, 0x1410, 0x151F]


def test_simd_and_scalar_dot() -> None:
    a, b = published.dot_factors()
    assert bits(published.scalar_dot(a, b)) == bits(published.simd_dot(a, b)) == 0x44191E70
    assert f"{published.simd_dot(a, b):.4f}" == "612.4756"
    lanes = np.zeros(8, np.float32)
    for k in range(0, 128, 8):
        lanes = published.fused_multiply_add(a[k : k + 8], b[k : k + 8], lanes)
    assert bits(published._halves(lanes)) == 0x44191E71


def test_the_two_dots_are_seldom_equal() -> None:
    """One input cannot say that the order does not matter."""
    a, b = np.random.Generator(np.random.Philox(6)).standard_normal((2, 20_000, 128), dtype=np.float32)
    equal = published.scalar_dot(a, b) == published.simd_dot(a, b)
    assert equal.mean() == pytest.approx(0.129, abs=0.005)


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3))
@settings(deadline=None, max_examples=300)
def test_fused_multiply_add_rounds_once(values: list[float]) -> None:
    a, b, c = (np.array([value], np.float32) for value in values)
    exact = Fraction(values[0]) * Fraction(values[1]) + Fraction(values[2])
    if exact == 0 or abs(exact) > Fraction(2) ** -60:
        found = published.fused_multiply_add(a, b, c)[0]
        error = abs(Fraction(float(found)) - exact)
        for end in (-np.inf, np.inf):
            other = Fraction(float(np.nextafter(found, np.float32(end))))
            assert error <= abs(other - exact)


def test_softmax_drift() -> None:
    before, behind = published.softmax_drift()
    assert (f"{100 * before:.4f}", f"{100 * behind:.6f}") == ("0.0513", "0.000578")
    assert f"{behind / before:.4f}" == "0.0113"


def test_rms_norm_drift() -> None:
    before, behind = published.rms_norm_drift()
    assert f"{behind / before:.4f}" == "1.0000"


def test_rope_drift() -> None:
    before, behind = published.rope_drift()
    assert f"{behind / before:.2f}" == "1.00"


@pytest.mark.parametrize("large", [True, False])
def test_a_matmul_twice_is_bit_equal(large: bool) -> None:
    x, w = published.matmul_fixture(large)
    once, again = matmul_f32(x, w), matmul_f32(x, w, threads=2)
    assert once.shape == ((4, 512) if large else (1, 64))
    np.testing.assert_array_equal(once.view(np.uint32), again.view(np.uint32))
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    np.testing.assert_allclose(once, exact, atol=2e-5)
    for row in range(x.shape[0]):
        np.testing.assert_array_equal(once[row], published.scalar_dot(w, x[row]))
