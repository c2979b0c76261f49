"""Formats whose steps are not known: what they usually leave, against quantizers of others."""

from __future__ import annotations

from pathlib import Path

import libgguf
import numpy as np
import pytest
import torch
from tests.analysis.planted import BAND, F32, ref

from driftscope.analysis.weights.sweep import compare_tensor, relation_of
from driftscope.faultbench.edited import EditedTensor


class Scaled(EditedTensor):
    """Values that were floats of eight bits times a factor."""

    @property
    def stored_dtype(self) -> str:
        return self.stored_name


def drawn(kind: str) -> F32:
    random = np.random.Generator(np.random.Philox(8))
    draw = {"normal": random.standard_normal, "laplace": random.laplace}[kind]
    return (0.03 * draw(size=(32, 1024))).astype(np.float32)


@pytest.mark.parametrize("kind", ["normal", "laplace"])
@pytest.mark.parametrize("fmt", ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "NVFP4"])
def test_what_a_codebook_of_ggml_leaves_is_its_own_error(fmt: str, kind: str) -> None:
    x = drawn(kind)
    random = np.random.Generator(np.random.Philox(9))
    importance = np.exp(random.standard_normal(1024)).astype(np.float32)
    raw = libgguf.quantize_rows(x, libgguf.GGMLQuantizationType[fmt], importance)
    raw = np.ascontiguousarray(raw).view(np.uint8).reshape(32, -1)
    b = EditedTensor("x", "x", x.shape, fmt, Path("x"), 0, raw.nbytes, _bytes=raw)
    row = compare_tensor(ref("x", x), b)
    assert 0.6 < row["nmse"] / row["expected_nmse"] < 1.5
    assert relation_of(row, BAND).name == "quantized-from"
    other = compare_tensor(ref("x", drawn("normal" if kind == "laplace" else "laplace")), b)
    assert relation_of(other, BAND).name == "different"


@pytest.mark.parametrize("kind", ["normal", "laplace"])
@pytest.mark.parametrize(
    ("fmt", "dtype", "largest"),
    [("F8_E4M3", torch.float8_e4m3fn, 448.0), ("F8_E5M2", torch.float8_e5m2, 57344.0)],
)
def test_floats_of_eight_bits_with_a_scale(fmt: str, dtype: torch.dtype, largest: float, kind: str) -> None:
    x = drawn(kind)
    scale = np.float32(np.abs(x).max() / largest)
    stored = (torch.from_numpy(x / scale).to(dtype).to(torch.float32).numpy() * scale).astype(np.float32)
    plain = vars(ref("x", stored)) | {"stored_name": fmt}
    row = compare_tensor(ref("x", x), Scaled(**plain))
    assert row["dtype_b"] == fmt
    assert 0.9 < row["nmse"] / row["expected_nmse"] < 1.1
    assert relation_of(row, BAND).name == "quantized-from"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16])
def test_torchs_rounding_to_a_smaller_float_is_a_downcast(dtype: torch.dtype) -> None:
    x = drawn("normal")
    names = {
        torch.float8_e4m3fn: "F8_E4M3",
        torch.float8_e5m2: "F8_E5M2",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
    }
    raw = torch.from_numpy(x).to(dtype).view(torch.uint8).numpy().reshape(32, -1)
    b = EditedTensor("x", "x", x.shape, names[dtype], Path("x"), 0, raw.nbytes, _bytes=raw)
    assert relation_of(compare_tensor(ref("x", x), b), BAND).name == "downcast"
    changed = raw.copy()
    changed[5, 6] ^= 1
    damaged = EditedTensor("x", "x", x.shape, names[dtype], Path("x"), 0, raw.nbytes, _bytes=changed)
    assert relation_of(compare_tensor(ref("x", x), damaged), BAND).name != "downcast"


def test_rounding_from_f64_is_done_once() -> None:
    """A value that rounds to the midpoint of two BF16 values in f32, and lies above it."""
    wide = np.array([[1.0 + 2.0**-8 + 2.0**-40] * 8], np.float64)
    raw = wide.view(np.uint8)
    a = EditedTensor("x", "x", (1, 8), "F64", Path("a"), 0, raw.nbytes, _bytes=raw)
    up = ref("x", np.full((1, 8), 1.0 + 2.0**-7, np.float32), "BF16")
    even = ref("x", np.ones((1, 8), np.float32), "BF16")
    assert relation_of(compare_tensor(a, up), BAND).name == "downcast"
    assert relation_of(compare_tensor(a, even), BAND).name != "downcast"
    narrow = ref("x", wide.astype(np.float32))
    assert relation_of(compare_tensor(a, narrow), BAND).name == "downcast"
