"""Quantized bytes, against the gguf package where it can quantize."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from driftscope.artifacts.derive.quantize import quantize

K_FORMATS = ("Q4_K", "Q5_K", "Q6_K")
FORMATS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


def _rows(count: int, columns: int, seed: int = 0) -> np.ndarray:
    """Rows of very different sizes, with a row of zeros and outliers."""
    random = np.random.Generator(np.random.Philox(seed))
    rows = random.standard_normal((count, columns)) * 10.0 ** random.uniform(-4, 2, (count, 1))
    rows[0] = 0
    rows[1, ::97] *= 50
    return rows.astype(np.float32)


@pytest.mark.parametrize("fmt", FORMATS)
def test_bytes_are_those_of_the_gguf_package(fmt: str) -> None:
    rows = _rows(37, 512)
    expected = gguf.quants.quantize(rows, gguf.GGMLQuantizationType[fmt])
    np.testing.assert_array_equal(quantize(rows, fmt), expected.view(np.uint8).reshape(37, -1))


@pytest.mark.parametrize("fmt", [*FORMATS, *K_FORMATS])
@pytest.mark.parametrize("threads", [2, 3, 64])
def test_bytes_do_not_depend_on_threads(fmt: str, threads: int) -> None:
    rows = _rows(37, 256)
    np.testing.assert_array_equal(quantize(rows, fmt, threads=threads), quantize(rows, fmt))


@pytest.mark.parametrize(("fmt", "bound"), [("Q4_K", 0.1), ("Q5_K", 0.05), ("Q6_K", 0.025)])
def test_k_formats_stay_within_their_step(fmt: str, bound: float) -> None:
    rows = np.random.Generator(np.random.Philox(1)).standard_normal((16, 512)).astype(np.float32)
    back = gguf.quants.dequantize(quantize(rows, fmt), gguf.GGMLQuantizationType[fmt])
    assert np.sqrt(np.mean((back - rows) ** 2)) < bound
