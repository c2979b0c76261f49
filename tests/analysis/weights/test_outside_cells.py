"""Values outside of the cells that they would be rounded to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import libgguf
import numpy as np
import pytest
from tests.analysis.planted import BAND, F32, ref

from driftscope.analysis.weights.outside_cells import outside_cells
from driftscope.analysis.weights.sweep import compare_tensor, relation_of
from driftscope.artifacts.tensor import TensorRef
from driftscope.faultbench.edited import EditedTensor

FORMATS = [
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "MXFP4"),
]


def drawn(kind: str) -> F32:
    random = np.random.Generator(np.random.Philox(5))
    draw = {"normal": random.standard_normal, "laplace": random.laplace}[kind]
    return (0.03 * draw(size=(64, 512))).astype(np.float32)


def share(a: TensorRef, b: TensorRef) -> float:
    outside, count = outside_cells(a, b)
    return outside / count


@pytest.mark.parametrize("kind", ["normal", "laplace"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_what_ggml_quantized_lies_in_its_cells(fmt: str, kind: str) -> None:
    x = drawn(kind)
    assert share(ref("x", x), ref("x", x, fmt)) < 1e-3


@pytest.mark.parametrize("fmt", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q6_K", "IQ4_XS"])
def test_an_importance_matrix_makes_no_other_weights(fmt: str) -> None:
    """The weights of channels vary by a factor of thousands, more than those of models."""
    x = drawn("normal")
    random = np.random.Generator(np.random.Philox(6))
    importance = np.exp(2 * random.standard_normal(512)).astype(np.float32)
    raw = libgguf.quantize_rows(x, libgguf.GGMLQuantizationType[fmt], importance).view(np.uint8)
    raw = np.ascontiguousarray(raw).reshape(64, -1)
    b = EditedTensor("x", "x", x.shape, fmt, Path("x"), 0, raw.nbytes, _bytes=raw)
    assert relation_of(compare_tensor(ref("x", x), b), BAND).name == "quantized-from"


@pytest.mark.parametrize("fmt", ["Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_XS", "Q3_K"])
def test_what_was_quantized_from_values_nearby_is_different(fmt: str) -> None:
    """Values off by a quarter of what the format's own error is: the energy grows by a sixteenth."""
    x = drawn("laplace")
    b = ref("x", x, fmt)
    error = compare_tensor(ref("x", x), b)["rmse"]
    noise = np.random.Generator(np.random.Philox(7)).standard_normal(x.shape)
    near = ref("x", x + np.float32(error / 4) * noise.astype(np.float32))
    row = compare_tensor(near, b)
    assert BAND.holds(row["nmse"], row["expected_nmse"])
    found = relation_of(row, BAND)
    assert found.name == "different"
    assert "other values" in found.evidence["reason"]


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_a_teacher_that_was_rounded_itself_is_no_other(dtype: str) -> None:
    """Quantized from the f32 checkpoint, and compared with the published one."""
    x = drawn("normal")
    assert share(ref("x", x, dtype), ref("x", x, "Q8_0")) < 1e-3


def test_formats_without_cells_have_none() -> None:
    x = drawn("normal")
    assert outside_cells(ref("x", x), ref("x", x, "BF16")) == (0, 0)
    assert outside_cells(ref("x", x), replace(ref("x", x[:32], "Q8_0"), shape=(32, 512))) == (0, 0)
