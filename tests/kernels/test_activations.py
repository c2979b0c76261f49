from __future__ import annotations

import ctypes

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers.generic_cpu import on_generic_cpu

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


class TypeTraits(ctypes.Structure):
    """The start of ``struct ggml_type_traits_cpu``."""

    _fields_ = (("from_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),)


def c_function(fmt: str, ggml_base, ggml_cpu):
    """The portable function of a ``_ref`` format; else the one that llama.cpp calls on this processor."""
    if fmt.endswith("_ref"):
        return getattr(ggml_base, f"quantize_row_{fmt}")
    ggml_cpu.ggml_get_type_traits_cpu.restype = ctypes.POINTER(TypeTraits)
    return ggml_cpu.ggml_get_type_traits_cpu(int(gguf.GGMLQuantizationType[fmt.upper()])).contents.from_float


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


# Blocks that are told apart by what is done with them: a value of any size, many values of few sizes (ties
# and equal maxima of both signs), half-way cases, and values around the smallest and the largest scales.
ANY = st.floats(width=32, allow_nan=True, allow_infinity=True)
VALUES = st.sampled_from(
    [
        st.floats(-4, 4, width=32),
        ANY,
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 127.0, -127.0]),
        st.integers(-254, 254).map(lambda i: i / 2),
        st.floats(-(2.0**-120), 2.0**-120, width=32),
        st.floats(width=32, allow_nan=False, allow_infinity=False),
    ]
)


@st.composite
def activations(draw: st.DrawFn, width: int) -> np.ndarray:
    values = draw(VALUES)
    x = np.full(width, draw(values), np.float32)
    count = draw(st.integers(1, width))
    x[:count] = draw(st.lists(values, min_size=count, max_size=count))
    if draw(st.booleans()):
        x[draw(st.integers(0, width - 1))] = draw(ANY)
    return x[None, :]


@pytest.mark.parametrize("fmt", INTEGER)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_block_equals_ggml(fmt: str, ggml_base, ggml_cpu, data: st.DataObject) -> None:
    x = data.draw(activations(256 if fmt == "q8_K" else 64))
    found = as_bytes(quantize_activation(x, fmt))
    expected = ggml_rows(c_function(fmt, ggml_base, ggml_cpu), x, fmt)
    np.testing.assert_array_equal(without_payload(found, fmt), without_payload(expected, fmt))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_value_in_half_precision_equals_ggml(ggml_base, data: st.DataObject) -> None:
    x = data.draw(activations(64))
    assert_float_formats(x, ggml_base)


@pytest.mark.parametrize("exponent", [-25, -24, -15, -14, -1, 0, 14, 15, 16])
def test_half_way_cases_of_half_precision_equal_ggml(exponent: int, ggml_base) -> None:
    """Every f16 and bf16 near a power of two, what lies half-way to the next, and their neighbours."""
    steps = np.arange(2**11, 2**12, dtype=np.float64) / 2**11 * 2.0**exponent
    x = np.concatenate([steps, -steps]).astype(np.float32)
    x = np.concatenate([x, np.nextafter(x, np.float32(0)), np.nextafter(x, np.float32(np.inf))])
    assert_float_formats(x[None, :], ggml_base)


@pytest.mark.parametrize("fmt", INTEGER)
def test_one_long_row_equals_ggml(fmt: str, ggml_base, ggml_cpu) -> None:
    x = np.random.Generator(np.random.Philox(9)).standard_normal((3, 18944)).astype(np.float32)
    x[1] *= np.exp(np.random.Generator(np.random.Philox(10)).standard_normal(18944)).astype(np.float32)
    found = as_bytes(quantize_activation(x, fmt))
    np.testing.assert_array_equal(found, ggml_rows(c_function(fmt, ggml_base, ggml_cpu), x, fmt))


@pytest.mark.parametrize("fmt", [*INTEGER, "apr_q8k", "f16", "bf16"])
def test_threads_do_not_change_the_bits(fmt: str) -> None:
    x = np.random.Generator(np.random.Philox(11)).standard_normal((200, 1024)).astype(np.float32)
    one, three = quantize_activation(x, fmt), quantize_activation(x, fmt, threads=3)
    np.testing.assert_array_equal(one.dequantize(), three.dequantize())


@pytest.mark.parametrize("fmt", [*INTEGER, "apr_q8k"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_finite_block_equals_reference(fmt: str, data: st.DataObject) -> None:
    x = np.nan_to_num(data.draw(activations(256)), nan=1.0, posinf=2.0, neginf=-2.0)
    x = np.where(np.abs(x) < np.float32(1e-30), np.float32(0), np.clip(x, -1e30, 1e30)).astype(np.float32)
    ours = quantize_activation(x, fmt)
    quants, d, s = reference.quantize_activation(x, fmt)
    np.testing.assert_array_equal(ours.quants, quants)
    np.testing.assert_array_equal(ours.d, d)
    if ours.s is not None:
        np.testing.assert_array_equal(ours.s, s)


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


def without_payload(stored: np.ndarray, fmt: str) -> np.ndarray:
    """The stored blocks with one NaN for all NaNs, whose payloads no format specifies."""
    stored = stored.copy()
    scales = stored[..., :4].view(np.float32) if fmt == "q8_K" else stored[..., : 4 if "q8_1" in fmt else 2]
    scales = scales if fmt == "q8_K" else np.ascontiguousarray(scales).view(np.float16)
    clean = np.where(np.isnan(scales), np.nan, scales).astype(scales.dtype)
    return np.concatenate([clean.view(np.uint8), stored[..., clean.itemsize * clean.shape[-1] :]], axis=-1)


def test_float_formats(ggml_base) -> None:
    x = np.concatenate([case.reshape(-1) for case in (inputs() | odd_inputs()).values()])[None, :]
    np.testing.assert_array_equal(quantize_activation(x, "none").dequantize(), x)
    assert_float_formats(x, ggml_base)


def assert_float_formats(x: np.ndarray, ggml_base) -> None:
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


def test_a_plain_processor_gives_the_same_bits() -> None:
    cases = {name: x for name, x in inputs().items() if name in ("gaussian", "ties", "subnormal scale")}
    formats = [*INTEGER, "apr_q8k", "f16", "bf16"]
    calls = {f"{fmt} {name}": (x, fmt) for name, x in cases.items() for fmt in formats}
    theirs = on_generic_cpu("driftscope.kernels.activations:quantize_activation", calls)
    for name, (x, fmt) in calls.items():
        np.testing.assert_array_equal(
            theirs[name].dequantize(), quantize_activation(x, fmt).dequantize(), name
        )
