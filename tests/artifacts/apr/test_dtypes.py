"""Values of an .apr file's dtypes, against the gguf package, plain loops and the bounds of their formulas."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from tests.helpers import apr_bytes

from driftscope.artifacts.apr import dtypes as apr_dtypes
from driftscope.artifacts.apr.dtypes import (
    NAMES,
    AprTensor,
    apr_q4_of_q4_0,
    apr_tensor,
    dequantize_q4,
    dequantize_q8,
    format_read_as,
    q4_0_of_apr_q4,
    q8_scale,
    quantize_q4,
    quantize_q8,
)
from driftscope.artifacts.tensor import TensorRef
from driftscope.errors import InputError
from driftscope.kernels.dequantize import dequantize

F32 = NDArray[np.float32]

FLOATS = arrays(
    np.float32,
    st.integers(1, 200),
    elements=st.floats(-60000, 60000, width=32, allow_subnormal=False),
)
WEIGHTS = np.random.Generator(np.random.Philox(3)).standard_normal((6, 512), dtype=np.float32)


def _ref(folder: Path, code: int, shape: tuple[int, ...], data: bytes) -> TensorRef:
    file = folder / "t"
    file.write_bytes(b"\0" * 64 + data)
    return apr_tensor(TensorRef("t", "t", shape, NAMES[code], file, 64, len(data)))


def _values(ref: TensorRef) -> NDArray[np.generic]:
    return dequantize(np.ascontiguousarray(ref.raw()), ref.dtype).reshape(ref.shape)


def _plain_q4(data: bytes, count: int) -> list[float]:
    values = []
    for start in range(0, len(data), 18):
        scale = np.float32(struct.unpack_from("<e", data, start)[0])
        for byte in data[start + 2 : start + 18]:
            values += [np.float32((byte & 15) - 8) * scale, np.float32((byte >> 4) - 8) * scale]
    return [float(value) for value in values[:count]]


@pytest.mark.parametrize("columns", [512, 96, 33, 1])
def test_apr_q4(tmp_path: Path, columns: int) -> None:
    values = WEIGHTS[:5, :columns]
    ref = _ref(tmp_path, *apr_bytes.apr_q4(values))
    assert isinstance(ref, AprTensor)
    assert ref.stored_dtype == "AprQ4"
    assert ref.dtype == ("F32" if columns % 32 else "Q4_0")
    data = apr_bytes.apr_q4(values)[2]
    assert _values(ref).reshape(-1).tolist() == _plain_q4(data, values.size)
    # What we write is what the plain packing gives.
    assert quantize_q4(values.reshape(-1)).tobytes() == data


def test_apr_q4_as_q4_0_is_what_the_gguf_package_reads() -> None:
    """Random bytes: every nibble, and scales that no quantizer would choose."""
    random = np.random.Generator(np.random.Philox(5))
    stored = random.integers(0, 256, 18 * 700, dtype=np.uint8)
    stored.reshape(-1, 18)[:, 1] &= 0xBF  # neither infinity nor NaN
    found = gguf.quants.dequantize(q4_0_of_apr_q4(stored), gguf.GGMLQuantizationType.Q4_0)
    np.testing.assert_array_equal(found, dequantize_q4(stored, 700 * 32))
    np.testing.assert_array_equal(apr_q4_of_q4_0(q4_0_of_apr_q4(stored)), stored)


@pytest.mark.parametrize("columns", [512, 96, 33, 1])
def test_apr_q8(tmp_path: Path, columns: int) -> None:
    values = WEIGHTS[:5, :columns]
    code, shape, data = apr_bytes.apr_q8(values)
    ref = _ref(tmp_path, code, shape, data)
    assert isinstance(ref, AprTensor)
    assert ref.stored_dtype == "AprQ8"
    assert ref.dtype == ("F32" if columns % 256 else "Q8_K")
    scale = np.float32(struct.unpack_from("<f", data)[0])
    expected = [np.float32(q) * scale for q in struct.unpack(f"<{values.size}b", data[4:])]
    assert _values(ref).reshape(-1).tolist() == [float(value) for value in expected]
    assert dequantize_q8(np.frombuffer(data, np.uint8)).tolist() == [float(value) for value in expected]
    largest = q8_scale(float(np.abs(values).max()))
    assert largest == scale
    assert quantize_q8(values.reshape(-1), largest).tobytes() == data[4:]


def test_apr_q8_as_q8_k_has_the_sums_of_its_blocks(tmp_path: Path) -> None:
    """What an integer dot product reads beside the values (ggml-common.h, ``block_q8_K``)."""
    code, shape, data = apr_bytes.apr_q8(WEIGHTS)
    blocks = _ref(tmp_path, code, shape, data).raw().reshape(-1, 292)
    quants = np.frombuffer(data, np.int8, offset=4).reshape(-1, 16, 16)
    assert np.array_equal(blocks[:, 260:].copy().view("<i2"), quants.sum(axis=2))


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
@pytest.mark.parametrize("columns", [256, 300, 40])
def test_k_quants_in_padded_rows(tmp_path: Path, kind: str, columns: int) -> None:
    import libgguf

    padded = np.zeros((6, -(-columns // 256) * 256), np.float32)
    padded[:, :columns] = WEIGHTS[:, :columns]
    code = {"Q4_K": 12, "Q6_K": 14}[kind]
    out = np.empty((6, padded.shape[1] // 256 * {12: 144, 14: 210}[code]), np.uint8)
    libgguf.quantize_rows_into_raw(code, padded, out, 6, padded.shape[1])
    ref = _ref(tmp_path, code, (6, columns), out.tobytes())
    assert ref.stored_dtype == kind
    assert ref.dtype == (kind if columns == 256 else "F32")
    expected = gguf.quants.dequantize(out, gguf.GGMLQuantizationType[kind])[:, :columns]
    np.testing.assert_array_equal(_values(ref), expected)


@pytest.mark.parametrize(
    ("code", "dtype", "values"),
    [
        (4, "<i4", [-(2**31), -1, 0, 2**31 - 1]),
        (5, "<i8", [-(2**53), -1, 0, 2**53]),
        (6, "i1", [-128, -1, 0, 127]),
        (7, "u1", [0, 1, 128, 255]),
        (3, "<f8", [1e300, -0.1, 0.0, 5e-324]),
        (0, "<f4", [1e30, -0.1, 0.0, 1e-45]),
        (1, "<f2", [65504.0, -0.1, 0.0, 6e-8]),
    ],
)
def test_numbers(tmp_path: Path, code: int, dtype: str, values: list[float]) -> None:
    stored = np.array(values, dtype=dtype).reshape(2, 2)
    ref = _ref(tmp_path, code, (2, 2), stored.tobytes())
    raw = np.ascontiguousarray(ref.raw())
    found = raw.view("<f8") if ref.dtype == "F64" else dequantize(raw, ref.dtype)
    assert ref.stored_dtype == NAMES[code]
    assert found.astype(np.float64).tolist() == stored.astype(np.float64).tolist()


@pytest.mark.parametrize("value", [2**53 + 1, -(2**53) - 1, -(2**63), 2**63 - 1])
def test_whole_numbers_that_float64_cannot_hold(tmp_path: Path, value: int) -> None:
    ref = _ref(tmp_path, 5, (1, 1), struct.pack("<q", value))
    with pytest.raises(InputError, match=r"t holds whole numbers beyond 2\^53"):
        ref.raw()


def test_bf16_stays_as_it_is(tmp_path: Path) -> None:
    ref = _ref(tmp_path, 30, (1, 2), struct.pack("<HH", 0x3F80, 0xC000))
    assert (type(ref), ref.dtype) == (TensorRef, "BF16")
    assert _values(ref).tolist() == [[1.0, -2.0]]


def test_a_file_that_has_gone(tmp_path: Path) -> None:
    ref = _ref(tmp_path, *apr_bytes.apr_q4(WEIGHTS))
    (tmp_path / "t").unlink()
    with pytest.raises(InputError, match="t cannot be read"):
        ref.raw()


@given(FLOATS)
@settings(max_examples=200, deadline=None)
def test_error_of_apr_q4_is_half_a_step(values: F32) -> None:
    """The scale is rounded to f16, by at most 2**-11 of it where f16 is normal; 7 steps carry that error."""
    found = dequantize_q4(quantize_q4(values), values.size)
    for start in range(0, values.size, 32):
        block, back = values[start : start + 32].astype(np.float64), found[start : start + 32]
        step = np.abs(block).max() / 7
        rounding = 7 * max(step * 2**-11, 2**-25)
        assert np.abs(block - back).max() <= step / 2 * (1 + 1e-6) + rounding


@given(FLOATS)
@settings(max_examples=200, deadline=None)
def test_error_of_apr_q8_is_half_a_step(values: F32) -> None:
    scale = q8_scale(float(np.abs(values).max()))
    stored = np.concatenate([np.array([scale], "<f4").view(np.uint8), quantize_q8(values, scale)])
    step = float(np.abs(values).max()) / 127
    assert np.abs(values.astype(np.float64) - dequantize_q8(stored)).max() <= step / 2 * (1 + 1e-5) + 1e-40


@given(FLOATS)
@settings(max_examples=100, deadline=None)
def test_quantizing_again_changes_nothing(values: F32) -> None:
    """A block whose largest value is 7 steps of an f16 scale is a fixed point."""
    once = dequantize_q4(quantize_q4(values), values.size)
    twice = dequantize_q4(quantize_q4(once), values.size)
    np.testing.assert_allclose(twice, once, rtol=2**-10, atol=1e-7)


def test_values_of_zero_have_a_scale_of_one() -> None:
    zeros = np.zeros(40, np.float32)
    assert quantize_q4(zeros)[:2].view("<f2")[0] == 1
    assert q8_scale(0.0) == 1
    assert not dequantize_q4(quantize_q4(zeros), 40).any()


def test_formats_that_each_dtype_is_read_as() -> None:
    assert format_read_as("I8", (4,)) == "F32"
    assert format_read_as("I64", (4,)) == "F64"
    assert {name: format_read_as(name, (2, 256)) for name in NAMES.values()} == {
        "F32": "F32", "F16": "F16", "F64": "F64", "BF16": "BF16", "I32": "F64", "I64": "F64", "I8": "F32",
        "U8": "F32", "AprQ4": "Q4_0", "AprQ8": "Q8_K", "Q4_K": "Q4_K", "Q6_K": "Q6_K",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["AprQ4", "AprQ8", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("columns", [300, 40])
def test_the_error_that_stored_steps_usually_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, columns: int
) -> None:
    """Measured: of normal values that are quantized by the plain packing, or by ggml."""
    import libgguf

    values = np.random.Generator(np.random.Philox(8)).standard_normal((64, columns), dtype=np.float32)
    if kind.startswith("Apr"):
        packed = {"AprQ4": apr_bytes.apr_q4, "AprQ8": apr_bytes.apr_q8}[kind](values)
    else:
        code = {"Q4_K": 12, "Q6_K": 14}[kind]
        padded = np.zeros((64, -(-columns // 256) * 256), np.float32)
        padded[:, :columns] = values
        out = np.empty((64, padded.shape[1] // 256 * {12: 144, 14: 210}[code]), np.uint8)
        libgguf.quantize_rows_into_raw(code, padded, out, 64, padded.shape[1])
        packed = code, values.shape, out.tobytes()
    ref = _ref(tmp_path, *packed)
    assert isinstance(ref, AprTensor)
    expected = ref.usual_nmse()
    monkeypatch.setattr(apr_dtypes, "_VALUES_AT_ONCE", 32 * 25)
    assert ref.usual_nmse() == pytest.approx(expected, rel=1e-12)
    measured = float(np.sum((_values(ref).astype(np.float64) - values) ** 2) / np.sum(values**2.0))
    assert expected is not None
    assert 0.7 < measured / expected < 1.3


def test_integers_leave_no_error(tmp_path: Path) -> None:
    ref = _ref(tmp_path, 6, (2, 2), b"\x01\x02\x03\x04")
    assert isinstance(ref, AprTensor)
    assert ref.usual_nmse() is None
    zeros = _ref(tmp_path, 129, (1, 4), struct.pack("<f", 1.0) + bytes(4))
    assert isinstance(zeros, AprTensor)
    assert zeros.usual_nmse() is None


@pytest.mark.parametrize(
    ("code", "data"),
    [
        (128, struct.pack("<e", float("inf")) + bytes(range(16))),
        (128, struct.pack("<e", float("nan")) + bytes([0x88] * 16)),
        (129, struct.pack("<f", float("inf")) + bytes(20)),
        (12, b"\xff" * 144),
        (14, b"\xff" * 210),
    ],
)
def test_scales_that_are_not_finite(tmp_path: Path, code: int, data: bytes) -> None:
    """The values are what they are, without a warning; nothing is predicted of them."""
    ref = _ref(tmp_path, code, (1, 20), data)
    assert isinstance(ref, AprTensor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not np.isfinite(_values(ref)).all()
        assert ref.usual_nmse() is None
