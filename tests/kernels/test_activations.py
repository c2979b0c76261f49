from __future__ import annotations

import ctypes

import numpy as np
import pytest

from driftscope.errors import InputError
from driftscope.kernels.activations import QuantizedActivation, quantize_activation
from driftscope.kernels.reference import activations as reference
from driftscope.kernels.reference import published

WIDTH = 1024
INTEGER = ["q8_0", "q8_1", "q8_0_ref", "q8_1_ref", "q8_K"]


def inputs() -> dict[str, np.ndarray]:
    generator = np.random.Generator(np.random.Philox(7))
    normal = generator.standard_normal((16, WIDTH)).astype(np.float32)
    outliers = normal.copy()
    outliers[:, ::97] *= 300
    ties = generator.integers(-254, 255, (16, WIDTH)).astype(np.float32) / 2
    ties[:, ::32] = 127
    flipped = ties.copy()
    flipped[:, ::32] = -127
    return {
        "gaussian": normal,
        "outliers": outliers,
        "ties": ties,
        "ties, negative maximum": flipped,
        "constant": np.full((2, WIDTH), -0.37, np.float32),
        "zero": np.zeros((2, WIDTH), np.float32),
        "negative zero": np.full((2, WIDTH), -0.0, np.float32),
        "small": normal * np.float32(1e-6),
        "subnormal scale": normal * np.float32(1e-37),
        "denormal": (normal * np.float32(1e-40)).astype(np.float32),
        "f16 overflow": normal * np.float32(1e7),
        "huge": normal * np.float32(1e37),
    }


def odd_inputs() -> dict[str, np.ndarray]:
    generator = np.random.Generator(np.random.Philox(8))
    cases = {}
    for name, value in (("nan", np.nan), ("infinity", np.inf), ("negative infinity", -np.inf)):
        for at in (0, 5, 17, 31, 255):
            x = generator.standard_normal((1, WIDTH)).astype(np.float32)
            x[0, at] = value
            cases[f"{name} at {at}"] = x
        x = generator.standard_normal((64, WIDTH)).astype(np.float32)
        x[generator.random(x.shape) < 0.05] = value
        cases[f"many of {name}"] = x
        cases[f"all {name}"] = np.full((1, WIDTH), value, np.float32)
    return cases


def ggml_rows(function, x: np.ndarray, fmt: str) -> np.ndarray:
    """The bytes that a C function ``quantize_row_*(x, y, k)`` writes for each row."""
    block, size = (256, 292) if fmt == "q8_K" else (32, 36 if "q8_1" in fmt else 34)
    out = np.zeros((x.shape[0], x.shape[1] // block, size), np.uint8)
    for row, into in zip(x, out, strict=True):
        function(
            ctypes.c_void_p(row.ctypes.data), ctypes.c_void_p(into.ctypes.data), ctypes.c_int64(row.size)
        )
    return out


def as_bytes(activation: QuantizedActivation) -> np.ndarray:
    """Our result in the block layout of ggml-common.h."""
    n, blocks = activation.d.shape
    quants = activation.quants.reshape(n, blocks, -1)
    with np.errstate(over="ignore"):
        half = activation.d.astype(np.float16)
    if activation.format == "q8_K":
        sums = quants.reshape(n, blocks, 16, 16).sum(axis=3).astype(np.int16)
        parts = [activation.d[..., None], quants, sums]
    elif activation.s is not None:
        parts = [half[..., None], activation.s.astype(np.float16)[..., None], quants]
    else:
        parts = [half[..., None], quants]
    return np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in parts], axis=2)


def c_function(fmt: str, ggml_base, ggml_cpu):
    if fmt.endswith("_ref"):
        return getattr(ggml_base, f"quantize_row_{fmt}")
    return getattr(ggml_cpu, f"quantize_row_{fmt}")


@pytest.mark.parametrize("fmt", INTEGER)
@pytest.mark.parametrize("case", list(inputs()))
def test_bytes_equal_ggml(fmt: str, case: str, ggml_base, ggml_cpu) -> None:
    x = inputs()[case]
    ours = quantize_activation(x, fmt)
    assert isinstance(ours, QuantizedActivation)
    np.testing.assert_array_equal(as_bytes(ours), ggml_rows(c_function(fmt, ggml_base, ggml_cpu), x, fmt))


@pytest.mark.parametrize("fmt", INTEGER)
@pytest.mark.parametrize("case", list(odd_inputs()))
def test_non_finite_bytes_equal_ggml(fmt: str, case: str, ggml_base, ggml_cpu) -> None:
    x = odd_inputs()[case]
    ours = quantize_activation(x, fmt)
    assert isinstance(ours, QuantizedActivation)
    np.testing.assert_array_equal(as_bytes(ours), ggml_rows(c_function(fmt, ggml_base, ggml_cpu), x, fmt))


@pytest.mark.parametrize("fmt", [*INTEGER, "apr_q8k"])
@pytest.mark.parametrize("case", ["gaussian", "outliers", "ties", "constant", "zero", "small"])
def test_equals_reference(fmt: str, case: str) -> None:
    x = inputs()[case]
    ours = quantize_activation(x, fmt)
    quants, d, s = reference.quantize_activation(x, fmt)
    np.testing.assert_array_equal(ours.quants, quants)
    np.testing.assert_array_equal(ours.d, d)
    if ours.s is not None:
        np.testing.assert_array_equal(ours.s, s)


def test_the_two_variants_differ_but_little() -> None:
    x = inputs()["ties"]
    simd, portable = (quantize_activation(x, fmt).quants.astype(int) for fmt in ("q8_0", "q8_0_ref"))
    difference = np.abs(simd - portable)
    assert difference.max() == 1
    assert 0 < np.count_nonzero(difference) < 0.3 * difference.size


def test_apr_q8k_is_the_published_format() -> None:
    x = published.activation()
    quants, scale = published.quantize_apr_q8k(x)
    ours = quantize_activation(x[None, :], "apr_q8k")
    np.testing.assert_array_equal(ours.quants, quants)
    np.testing.assert_array_equal(ours.d[0], scale)


def test_apr_q8k_leaves_nan_out() -> None:
    x = inputs()["gaussian"][:1].copy()
    x[0, 3] = np.nan
    ours = quantize_activation(x, "apr_q8k")
    assert ours.quants[0, 3] == 0
    assert np.all(np.isfinite(ours.d))


def test_float_formats(ggml_base) -> None:
    x = np.concatenate([case.reshape(-1) for case in (inputs() | odd_inputs()).values()])[None, :]
    assert quantize_activation(x, "none").dequantize() is not None
    np.testing.assert_array_equal(quantize_activation(x, "none").dequantize(), x)
    stored = np.empty(x.size, np.uint16)
    pointers = ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(stored.ctypes.data), ctypes.c_int64(x.size)
    ggml_base.ggml_fp32_to_bf16_row_ref(*pointers)
    ours = quantize_activation(x, "bf16").dequantize().view(np.uint32)
    np.testing.assert_array_equal(ours[0], stored.astype(np.uint32) << 16)
    ggml_base.ggml_fp32_to_fp16_row(*pointers)
    ours = quantize_activation(x, "f16").dequantize()[0]
    np.testing.assert_array_equal(ours, stored.view(np.float16).astype(np.float32))


@pytest.mark.parametrize("fmt", [*INTEGER, "apr_q8k"])
def test_dequantize_is_close(fmt: str) -> None:
    x = inputs()["gaussian"]
    error = np.abs(quantize_activation(x, fmt).dequantize() - x)
    largest = np.abs(x.reshape(-1, 32 if "q8_" in fmt and fmt != "q8_K" else 256)).max(axis=1)
    assert np.all(error.reshape(largest.size, -1) <= 0.504 / 127 * largest[:, None] + 5e-4 * largest[:, None])


def test_a_row_does_not_depend_on_the_others() -> None:
    x = inputs()["outliers"]
    whole, one = quantize_activation(x, "q8_1"), quantize_activation(x[3:4], "q8_1")
    np.testing.assert_array_equal(whole.quants[3:4], one.quants)


def test_bad_input_is_an_input_error() -> None:
    with pytest.raises(InputError, match="q9"):
        quantize_activation(np.zeros((1, 32), np.float32), "q9")
    with pytest.raises(InputError, match="multiple of 256"):
        quantize_activation(np.zeros((1, 288), np.float32), "q8_K")
