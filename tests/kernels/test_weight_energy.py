"""Sums of squares of a weight against NumPy, and of its rounding cells against quantized weights."""

from __future__ import annotations

import libgguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from driftscope.kernels.compare import compare
from driftscope.kernels.dequantize import dequantize
from driftscope.kernels.weight_energy import cell_energy_of_rows, weight_energy

QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16")


def gaussian(rows: int = 96, columns: int = 512, seed: int = 0) -> np.ndarray:
    g = np.random.Generator(np.random.Philox(seed))
    return (g.standard_normal((rows, columns)) * g.uniform(0.2, 2, (rows, 1))).astype(np.float32)


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    found = quants.quantize(values, GGMLQuantizationType[dtype])
    return np.ascontiguousarray(found).view(np.uint8).reshape(values.shape[0], -1)


@pytest.mark.parametrize("dtype", [*QUANTIZED, "F32"])
def test_sums_of_squares(dtype: str) -> None:
    raw = stored(gaussian(), dtype)
    factors = np.random.Generator(np.random.Philox(1)).random((3, 512))
    found = weight_energy(raw, dtype, factors)
    squares = np.square(dequantize(raw, dtype).astype(np.float64))
    assert np.allclose(found.columns, squares.sum(axis=0), rtol=1e-6)
    assert np.allclose(found.rows, factors @ squares.T, rtol=1e-6)
    assert not found.cell_columns.any()


@pytest.mark.parametrize("dtype", ["F16", "Q4_1", "Q8_0"])
def test_the_same_bits_whatever_the_threads(dtype: str) -> None:
    raw = stored(gaussian(700), dtype)
    factors = np.ones((1, 512))
    shifts = np.ones((1, 16)) if dtype.startswith("Q") else None
    one, three = (
        weight_energy(raw, dtype, factors, cells=True, shifts=shifts, threads=threads) for threads in (1, 3)
    )
    for name in ("columns", "rows", "cell_columns", "cell_rows", "shift_columns", "shift_rows"):
        assert np.array_equal(getattr(one, name), getattr(three, name)), name


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_cells_are_the_error_of_quantized_gaussians(dtype: str) -> None:
    values = gaussian()
    raw = stored(values, dtype)
    error = np.square(dequantize(raw, dtype).astype(np.float64) - values)
    factors = np.random.Generator(np.random.Philox(2)).random((1, 512)) + 0.5
    found = weight_energy(raw, dtype, factors, cells=True)
    assert 0.8 < error.sum() / found.cell_columns.sum() < 1.25
    ratios = (factors @ error.T) / found.cell_rows
    assert 0.5 < ratios.min() < ratios.max() < 2
    assert np.allclose(cell_energy_of_rows(raw, dtype).sum(axis=0), found.cell_columns, rtol=1e-9)


@pytest.mark.parametrize("dtype", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"])
def test_cells_are_those_of_the_comparison(dtype: str) -> None:
    values = gaussian(24)
    raw = np.asarray(libgguf.quantize_rows(values, libgguf.GGMLQuantizationType[dtype]))
    raw = raw.view(np.uint8).reshape(values.shape[0], -1)
    expected = compare(stored(values, "F32"), "F32", raw, dtype).expected_energy
    found = weight_energy(raw, dtype, np.ones((1, 512)), cells=True)
    assert expected is not None
    assert np.isclose(found.cell_columns.sum(), expected, rtol=1e-6)
    assert np.isclose(found.cell_rows.sum(), expected, rtol=1e-6)


def test_shifts_are_what_all_values_of_a_sub_block_share() -> None:
    raw = stored(gaussian(), "Q4_1")
    found = weight_energy(raw, "Q4_1", np.ones((1, 512)), shifts=np.ones((1, 16)))
    minima = raw.reshape(96, 16, 20)[:, :, 2:4].copy().view(np.float16)[:, :, 0].astype(np.float64)
    assert np.allclose(found.shift_columns, np.square(minima).sum(axis=0))
    assert np.allclose(found.shift_rows[0], np.square(minima).sum(axis=1))


def test_what_is_not_finite_counts_as_nothing() -> None:
    values = gaussian(8)
    values[3, 5] = np.inf
    values[4, 6] = np.nan
    found = weight_energy(stored(values, "F32"), "F32", np.ones((1, 512)))
    assert np.isfinite(found.columns).all()
    assert np.isfinite(found.rows).all()
