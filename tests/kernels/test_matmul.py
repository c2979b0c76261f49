from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driftscope.errors import InputError
from driftscope.kernels.dequantize import dequantize
from driftscope.kernels.formats import FORMATS
from driftscope.kernels.matmul import matmul_f32, matmul_f32_quantized
from driftscope.kernels.reference import matmul as reference

BLOCKS = [name for name, layout in FORMATS.items() if layout.is_integer]


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def gaussian(seed: int, *shape: int) -> np.ndarray:
    return generator(seed).standard_normal(shape).astype(np.float32)


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint32)


def random_rows(name: str, n_rows: int, n_columns: int, seed: int = 0) -> np.ndarray:
    """Random blocks whose scales are ordinary numbers."""
    layout = FORMATS[name]
    n_blocks = n_rows * n_columns // layout.block_size
    blocks = generator(seed).integers(0, 256, (n_blocks, layout.block_bytes), dtype=np.uint8)
    scale = generator(seed + 1).uniform(0.001, 0.02, (n_blocks, 2)).astype(np.float16)
    fields = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208}
    width = 4 if name in ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K") else 2
    at = fields.get(name, 0)
    if name == "Q8_K":
        blocks[:, :4] = scale[:, :1].astype(np.float32).view(np.uint8)
    elif name == "MXFP4":
        blocks[:, 0] = generator(seed + 1).integers(115, 130, n_blocks)
    else:
        blocks[:, at : at + width] = scale.view(np.uint8)[:, :width]
    return blocks.reshape(n_rows, -1)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), k=st.integers(0, 70), r=st.integers(1, 11), seed=st.integers(0, 99))
def test_f32_is_sequential(n: int, k: int, r: int, seed: int) -> None:
    x, w = gaussian(seed, n, k), gaussian(seed + 1, r, k)
    np.testing.assert_array_equal(bits(matmul_f32(x, w)), bits(reference.matmul_f32(x, w)))


def test_f32_deep_rows_are_sequential() -> None:
    """Deeper than the part that is worked on at a time."""
    x, w = gaussian(0, 3, 2100), gaussian(1, 5, 2100)
    np.testing.assert_array_equal(bits(matmul_f32(x, w)), bits(reference.matmul_f32(x, w)))


def test_f32_against_f64() -> None:
    x, w = gaussian(0, 65, 576), gaussian(1, 301, 576)
    exact = np.einsum("tk,rk->tr", x.astype(float), w.astype(float))
    bound = np.einsum("tk,rk->tr", abs(x).astype(float), abs(w).astype(float)) * 576 * 2.0**-24
    assert np.all(abs(matmul_f32(x, w) - exact) <= bound)


def test_f32_does_not_contract() -> None:
    """1 + 2^-12 squared needs 25 bits: a fused multiply-add would keep the last one."""
    value = np.float32(1 + 2.0**-12)
    x, w = np.array([[1.0, value]], np.float32), np.array([[-1.0, value]], np.float32)
    assert matmul_f32(x, w)[0, 0] == np.float32(value * value) - np.float32(1)


def test_f32_bits_do_not_depend_on_batch_or_threads() -> None:
    x, w = gaussian(0, 53, 200), gaussian(1, 700, 200)
    whole = bits(matmul_f32(x, w))
    np.testing.assert_array_equal(whole, bits(matmul_f32(x, w, threads=3)))
    for n in (1, 2, 7, 16, 17):
        np.testing.assert_array_equal(whole[:n], bits(matmul_f32(x[:n], w)))
    np.testing.assert_array_equal(whole[40:41, 11:300], bits(matmul_f32(x[40:41], w[11:300])))


def test_f32_keeps_infinities_and_nans_in_their_rows() -> None:
    x, w = gaussian(0, 20, 64), gaussian(1, 9, 64)
    x[3, 5], x[4, 6] = np.inf, np.nan
    out = matmul_f32(x, w)
    assert np.all(np.isinf(out[3]))
    assert np.all(np.isnan(out[4]))
    assert np.all(np.isfinite(np.delete(out, [3, 4], axis=0)))


@pytest.mark.parametrize("name", [*BLOCKS, "F16", "BF16", "F32", "F64", "TQ2_0"])
def test_f32_quantized_equals_dequantize_first(name: str) -> None:
    raw = random_rows(name, 21, 512) if name in BLOCKS else None
    if raw is None:
        weights = gaussian(0, 21, 512)
        stored = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
        raw = np.ascontiguousarray(weights.astype(stored[name])).view(np.uint8) if name in stored else None
    if name == "BF16":
        raw = (weights.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    if name == "TQ2_0":
        raw = random_rows("Q2_K", 21, 512)[:, :132]
        raw[:, 64:66] = raw[:, 130:132] = np.array([0.01], np.float16).view(np.uint8)
    x = gaussian(2, 18, 512)
    expected = matmul_f32(x, dequantize(raw, name))
    np.testing.assert_array_equal(bits(matmul_f32_quantized(x, raw, name)), bits(expected))
    np.testing.assert_array_equal(bits(matmul_f32_quantized(x, raw, name, threads=2)), bits(expected))


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="rows of 8 values"):
        matmul_f32(gaussian(0, 2, 7), gaussian(0, 2, 8))


def test_no_rows() -> None:
    assert matmul_f32(gaussian(0, 0, 8), gaussian(0, 2, 8)).shape == (0, 2)
    assert matmul_f32(gaussian(0, 2, 8), gaussian(0, 0, 8)).shape == (2, 0)
