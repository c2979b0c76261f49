from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.test_activations import as_bytes

from driftscope.errors import InputError
from driftscope.kernels.activations import QuantizedActivation, quantize_activation
from driftscope.kernels.dequantize import dequantize
from driftscope.kernels.formats import FORMATS
from driftscope.kernels.matmul import matmul_f32, matmul_f32_quantized, matmul_quantized
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


INTEGER = ["q8_0", "q8_1", "q8_0_ref", "q8_1_ref", "q8_K", "apr_q8k"]


@pytest.mark.parametrize("activation", INTEGER)
@pytest.mark.parametrize("name", BLOCKS)
def test_quantized_equals_reference(name: str, activation: str) -> None:
    """Every weight format with every activation format, bit for bit."""
    raw, x = random_rows(name, 7, 768), gaussian(2, 19, 768)
    x[3, 100] = 80
    ours = matmul_quantized(x, raw, name, activation=activation)
    np.testing.assert_array_equal(bits(ours), bits(reference.matmul_quantized(x, raw, name, activation)))


@pytest.mark.parametrize("name", [name for name in BLOCKS if name != "Q8_K"])
def test_quantized_equals_ggml_up_to_accumulation(name: str, ggml_cpu) -> None:
    """Against ggml's dot product of the same blocks: exact integers, f32 sums in another order."""
    layout = FORMATS[name]
    raw, x = random_rows(name, 24, 1536), gaussian(2, 6, 1536)
    activation = quantize_activation(x, layout.activation)
    assert isinstance(activation, QuantizedActivation)
    blocks = np.ascontiguousarray(as_bytes(activation).reshape(6, -1))
    function = getattr(ggml_cpu, f"ggml_vec_dot_{name.lower().replace('_k', '_K')}_{layout.activation}")
    theirs = np.empty((6, 24), np.float32)
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    for t in range(6):
        for r in range(24):
            out = ctypes.c_float()
            # fmt: off
            function(
                ctypes.c_int(1536), ctypes.byref(out), size(0), pointer(raw[r].ctypes.data), size(0),
                pointer(blocks[t].ctypes.data), size(0), ctypes.c_int(1),
            )
            # fmt: on
            theirs[t, r] = out.value
    ours = matmul_quantized(x, raw, name)
    # Each of about 3 x 48 roundings is at most 2^-24 of the terms that it rounds.
    terms = np.abs(activation.dequantize()) @ np.abs(dequantize(raw, name)).T.astype(float)
    assert np.max(np.abs(ours.astype(float) - theirs) / terms) <= 1e-6


def test_quantized_bits_do_not_depend_on_batch_or_threads() -> None:
    raw, x = random_rows("Q4_K", 300, 1024), gaussian(2, 37, 1024)
    whole = bits(matmul_quantized(x, raw, "Q4_K"))
    np.testing.assert_array_equal(whole, bits(matmul_quantized(x, raw, "Q4_K", threads=3)))
    for n in (1, 3, 16, 17):
        np.testing.assert_array_equal(whole[:n], bits(matmul_quantized(x[:n], raw, "Q4_K")))
    np.testing.assert_array_equal(whole[20:21, 5:90], bits(matmul_quantized(x[20:21], raw[5:90], "Q4_K")))


@pytest.mark.parametrize("name", ["Q4_1", "Q6_K"])
def test_quantized_extremes_stay_exact(name: str) -> None:
    """The largest integers that a block can hold, all of one sign."""
    raw, x = random_rows(name, 4, 512), np.full((2, 512), 5.0, np.float32)
    blocks = raw.reshape(-1, FORMATS[name].block_bytes)
    if name == "Q6_K":
        blocks[:, :192] = 0
        blocks[:, 192:208] = 128
    else:
        blocks[:, 4:] = 255
    activation = FORMATS[name].activation
    expected = reference.matmul_quantized(x, raw, name, activation)
    np.testing.assert_array_equal(bits(matmul_quantized(x, raw, name)), bits(expected))


@pytest.mark.parametrize(("name", "dtype"), [("F16", np.float16), ("F32", np.float32)])
def test_float_weights_round_the_activation_as_ggml(name: str, dtype: type) -> None:
    w, x = gaussian(0, 9, 96).astype(dtype), gaussian(1, 5, 96)
    ours = matmul_quantized(x, w.view(np.uint8), name)
    rounded = x.astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(bits(ours), bits(matmul_f32(rounded, w.astype(np.float32))))


def test_float_activation_is_path_a() -> None:
    raw, x = random_rows("Q5_0", 9, 96), gaussian(1, 5, 96)
    ours = matmul_quantized(x, raw, "Q5_0", activation="none")
    np.testing.assert_array_equal(bits(ours), bits(matmul_f32_quantized(x, raw, "Q5_0")))


def test_no_integer_product() -> None:
    with pytest.raises(InputError, match="TQ2_0"):
        matmul_quantized(gaussian(0, 1, 256), np.zeros((1, 66), np.uint8), "TQ2_0")
    with pytest.raises(InputError, match="F32"):
        matmul_quantized(gaussian(0, 1, 32), np.zeros((1, 128), np.uint8), "F32", activation="q8_0")
    with pytest.raises(InputError, match="multiple of 256"):
        matmul_quantized(gaussian(0, 1, 32), np.zeros((1, 18), np.uint8), "Q4_0", activation="q8_K")


def test_published_pair_is_close_to_the_published_order() -> None:
    from driftscope.kernels.reference import published

    block, x = published.block_bytes()[None, :], published.activation()[None, :]
    ours = matmul_quantized(x, block, "Q4_K", activation="apr_q8k")[0, 0]
    assert ours == pytest.approx(float(published.path_b_dot(block[0], x[0])), rel=5e-7)
