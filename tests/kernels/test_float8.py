"""Floats of eight bits, against torch's dtypes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from driftscope.errors import InputError
from driftscope.kernels.compare import compare
from driftscope.kernels.dequantize import dequantize
from driftscope.kernels.float8 import E8M0, FLOAT8, table_of
from driftscope.kernels.formats import FORMATS, row_bytes
from driftscope.kernels.matmul import matmul_f32, matmul_f32_quantized, matmul_quantized

TORCH = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
CODES = np.arange(256, dtype=np.uint8)


def torchs(codes: np.ndarray, name: str) -> np.ndarray:
    return torch.from_numpy(codes.copy()).view(TORCH[name]).to(torch.float32).numpy()


def random_codes(rows: int, columns: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(5)).integers(0, 256, (rows, columns), dtype=np.uint8)


def test_the_formats_are_those_of_the_tables() -> None:
    assert set(TORCH) == {*FLOAT8, E8M0} == {n for n, layout in FORMATS.items() if layout.ggml_type < 0}
    assert row_bytes("F8_E4M3", 37) == 37


@pytest.mark.parametrize("name", list(TORCH))
def test_all_codes_are_torchs(name: str) -> None:
    ours, theirs = dequantize(CODES.reshape(4, 64), name).reshape(-1), torchs(CODES, name)
    assert np.array_equal(np.isnan(ours), np.isnan(theirs))
    known = ~np.isnan(ours)
    assert np.array_equal(ours[known].view(np.uint32), theirs[known].view(np.uint32))


def test_codes_that_are_not_finite() -> None:
    counts = {
        name: (int(np.isnan(table_of(name)).sum()), int(np.isinf(table_of(name)).sum())) for name in TORCH
    }
    assert counts == {
        "F8_E4M3": (2, 0),
        "F8_E5M2": (6, 2),
        "F8_E4M3FNUZ": (1, 0),
        "F8_E5M2FNUZ": (1, 0),
        "F8_E8M0": (1, 0),
    }
    assert np.nanmax(table_of("F8_E4M3")) == 448


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_whatever_their_number_and_threads(threads: int) -> None:
    for shape in ((0, 8), (1, 1), (3, 37), (70, 513)):
        codes = random_codes(*shape)
        codes.setflags(write=False)
        found = dequantize(codes, "F8_E5M2", threads=threads)
        assert np.array_equal(found, torchs(codes, "F8_E5M2"), equal_nan=True)


def test_comparison_counts_and_sums() -> None:
    codes = random_codes(64, 300)
    values = torchs(codes, "F8_E4M3")
    exact = compare(values.view(np.uint8), "F32", codes, "F8_E4M3")
    assert exact.nan_a == exact.nan_b == int(np.isnan(values).sum())
    assert exact.sum_dd == 0
    assert exact.identical_count == exact.compared_count == values.size - exact.nan_a
    other = np.nan_to_num(values) * np.float32(1.01)
    found = compare(other.view(np.uint8), "F32", codes, "F8_E4M3")
    keep = ~np.isnan(values)
    expected = np.sum((other[keep].astype(np.float64) - values[keep]) ** 2)
    assert found.sum_dd == pytest.approx(expected, rel=1e-12)


def test_products_are_those_of_the_decoded_rows() -> None:
    codes = random_codes(40, 96) & 0x77
    x = np.random.Generator(np.random.Philox(6)).standard_normal((5, 96), dtype=np.float32)
    expected = matmul_f32(x, torchs(codes, "F8_E4M3"))
    assert np.array_equal(matmul_f32_quantized(x, codes, "F8_E4M3"), expected)
    assert np.array_equal(matmul_quantized(x, codes, "F8_E4M3"), expected)
    with pytest.raises(InputError, match="no integer dot product"):
        matmul_quantized(x, codes, "F8_E4M3", activation="q8_0")
