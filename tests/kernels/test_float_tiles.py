from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers.generic_cpu import on_generic_cpu
from tests.kernels.test_matmul import bits, gaussian, random_rows

from driftscope.kernels.float_vectors import DEPTH, WIDTH
from driftscope.kernels.formats import FORMATS
from driftscope.kernels.matmul import matmul_f32, matmul_f32_quantized
from driftscope.kernels.reference import matmul as reference
from driftscope.kernels.reference.dequantize import dequantize

FLOATS = ("F32", "BF16", "F16")
NATIVE = [name for name, layout in FORMATS.items() if layout.is_integer] + list(FLOATS)


def stored_rows(name: str, n_rows: int, n_blocks: int, seed: int) -> np.ndarray:
    """Stored rows with ordinary values; `n_blocks` is the number of columns of a float format."""
    if name not in FLOATS:
        return random_rows(name, n_rows, n_blocks * FORMATS[name].block_size, seed)
    values = gaussian(seed, n_rows, n_blocks)
    if name == "BF16":
        return (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
    return (values.astype(np.float16) if name == "F16" else values).view(np.uint8)


def values_of(raw: np.ndarray, name: str) -> np.ndarray:
    if name == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if name in FLOATS:
        return raw.view({"F16": "<f2", "F32": "<f4"}[name]).astype(np.float32)
    return dequantize(raw, name)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(NATIVE),
    n=st.integers(1, 20),
    n_rows=st.integers(1, 2 * WIDTH + 3),
    n_blocks=st.integers(1, 3),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_every_format_is_summed_one_column_after_the_other(
    name: str, n: int, n_rows: int, n_blocks: int, threads: int, seed: int
) -> None:
    raw = stored_rows(name, n_rows, n_blocks, seed)
    values = values_of(raw, name)
    x = gaussian(seed, n, values.shape[1])
    ours = matmul_f32_quantized(x, raw, name, threads=threads)
    np.testing.assert_array_equal(bits(ours), bits(reference.matmul_f32(x, values)))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(FLOATS),
    n=st.integers(1, 8),
    n_rows=st.integers(1, 3 * WIDTH),
    n_columns=st.integers(1, 2 * DEPTH + 17),
    seed=st.integers(0, 99),
)
def test_floats_of_any_width(name: str, n: int, n_rows: int, n_columns: int, seed: int) -> None:
    raw, x = stored_rows(name, n_rows, n_columns, seed), gaussian(seed, n, n_columns)
    expected = reference.matmul_f32(x, values_of(raw, name))
    np.testing.assert_array_equal(bits(matmul_f32_quantized(x, raw, name)), bits(expected))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q6_K", "Q2_K", *FLOATS])
def test_a_token_and_a_row_do_not_see_the_others(name: str) -> None:
    """Tiles of every number of tokens, groups of rows that are not full, any number of threads."""
    n_columns = 1280
    raw = stored_rows(name, 75, n_columns // FORMATS[name].block_size, 1)
    x = gaussian(2, 43, n_columns)
    whole = bits(matmul_f32_quantized(x, raw, name))
    for n in [*range(1, 14), 43]:
        np.testing.assert_array_equal(bits(matmul_f32_quantized(x[:n], raw, name, threads=2)), whole[:n])
    for n_rows in (1, 15, 16, 31, 32, 33, 48, 64):
        for n in (1, 2, 7):
            np.testing.assert_array_equal(
                bits(matmul_f32_quantized(x[:n], raw[:n_rows], name)), whole[:n, :n_rows]
            )


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("n", [1, 3])
def test_subnormal_and_non_finite_weights(name: str, n: int) -> None:
    weights = gaussian(3, WIDTH, 64)
    weights[0] *= 2.0**-20 if name == "F16" else 2.0**-130
    weights[1, 5], weights[2, 6], weights[3, 7] = np.inf, -np.inf, np.nan
    weights[4, :2] = np.inf, -np.inf
    raw = weights.view(np.uint8)
    if name == "BF16":
        raw = (weights.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
    if name == "F16":
        raw = weights.astype(np.float16).view(np.uint8)
    x = gaussian(4, n, 64)
    x[0, :2] = 1
    ours = matmul_f32_quantized(x, raw, name)
    with np.errstate(all="ignore"):
        expected = reference.matmul_f32(x, values_of(raw, name))
    np.testing.assert_array_equal(ours, expected)
    assert np.isnan(ours[0, 3])
    assert np.isnan(ours[0, 4])
    assert np.isinf(ours[0, 1])
    assert np.isfinite(ours[:, [0, *range(5, WIDTH)]]).all()


def test_strides_and_read_only_rows() -> None:
    raw = np.asfortranarray(stored_rows("Q5_0", 40, 4, 0))
    x = gaussian(1, 256, 5).T[:, ::2]
    raw.flags.writeable = x.flags.writeable = False
    expected = reference.matmul_f32(np.ascontiguousarray(x), dequantize(np.ascontiguousarray(raw), "Q5_0"))
    np.testing.assert_array_equal(bits(matmul_f32_quantized(x, raw, "Q5_0")), bits(expected))


def test_nothing_to_multiply() -> None:
    raw = stored_rows("Q8_0", 3, 2, 0)
    assert matmul_f32_quantized(np.empty((0, 64), np.float32), raw, "Q8_0").shape == (0, 3)
    assert matmul_f32_quantized(gaussian(0, 2, 64), raw[:0], "Q8_0").shape == (2, 0)
    np.testing.assert_array_equal(matmul_f32(np.empty((2, 0), np.float32), np.empty((3, 0), np.float32)), 0)


def test_formats_without_a_kernel_are_read_through_gguf() -> None:
    from gguf import GGMLQuantizationType, quants

    raw = np.random.Generator(np.random.Philox(1)).integers(0, 60, (700, 110), dtype=np.uint8)
    x = gaussian(0, 2, 256)
    expected = reference.matmul_f32(x, quants.dequantize(raw, GGMLQuantizationType.IQ3_S))
    np.testing.assert_array_equal(bits(matmul_f32_quantized(x, raw, "IQ3_S", threads=2)), bits(expected))


@pytest.mark.slow
def test_a_plain_processor_gives_the_same_bits() -> None:
    calls = {}
    for name in NATIVE:
        n_columns = 512 + FORMATS[name].block_size
        raw = stored_rows(name, 37, n_columns // FORMATS[name].block_size, 5)
        for n in (1, 9):
            calls[f"{name} {n}"] = (gaussian(n, n, n_columns), raw, name)
    theirs = on_generic_cpu("driftscope.kernels.matmul:matmul_f32_quantized", calls)
    for key, arguments in calls.items():
        np.testing.assert_array_equal(bits(matmul_f32_quantized(*arguments)), bits(theirs[key]))
