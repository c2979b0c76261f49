from __future__ import annotations

import ctypes
from pathlib import Path

import libgguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers.generic_cpu import on_generic_cpu

from driftscope.errors import InputError
from driftscope.kernels.dequantize import dequantize
from driftscope.kernels.formats import FORMATS
from driftscope.kernels.reference import dequantize as reference

BLOCKS = [name for name, layout in FORMATS.items() if layout.is_integer]
# Q8_K is an intermediate format: the gguf package cannot read it, libgguf neither.
STORED = [name for name in BLOCKS if name != "Q8_K"]
OTHERS = [name for name, layout in FORMATS.items() if not layout.native]

# Byte offsets of the f16 fields of each block.
F16_FIELDS = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "MXFP4": (),
}
ODD_SCALES = np.array(
    [
        0x0000,
        0x8000,
        0x0001,
        0x8001,
        0x03FF,
        0x0400,
        0x3C00,
        0x7BFF,
        0xFBFF,
        0x7C00,
        0xFC00,
        0x7E00,
        0xFE00,
        0x7E01,
        0x7FFF,
        0x7C01,
        0xFC01,
    ],
    "<u2",
)


def random_rows(name: str, n_rows: int, n_columns: int, seed: int = 0) -> np.ndarray:
    layout = FORMATS[name]
    size = (n_rows, n_columns // layout.block_size * layout.block_bytes)
    return np.random.Generator(np.random.Philox(seed)).integers(0, 256, size, dtype=np.uint8)


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint32)


class TypeTraits(ctypes.Structure):
    """``ggml_type_traits`` of ggml.h, as far as it is read here."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block_size", ctypes.c_int64),
        ("interleaved", ctypes.c_int64),
        ("block_bytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
    )


def ggmls(raw: np.ndarray, name: str, ggml_base: ctypes.CDLL) -> np.ndarray:
    """The values that ggml's own C code gives."""
    layout = FORMATS[name]
    ggml_base.ggml_get_type_traits.restype = ctypes.POINTER(TypeTraits)
    traits = ggml_base.ggml_get_type_traits(layout.ggml_type).contents
    assert (traits.block_size, traits.block_bytes) == (layout.block_size, layout.block_bytes)
    raw = np.ascontiguousarray(raw)
    values = np.empty((raw.shape[0], raw.shape[1] // layout.block_bytes * layout.block_size), np.float32)
    convert = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(traits.to_float)
    convert(raw.ctypes.data, values.ctypes.data, values.size)
    return values


def expected(raw: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return quants.dequantize(raw, GGMLQuantizationType[name])


@pytest.mark.parametrize("name", STORED)
def test_random_bytes_equal_gguf_libgguf_and_ggml(name: str, ggml_base: ctypes.CDLL) -> None:
    raw = random_rows(name, 67, 1536)
    ours = bits(dequantize(raw, name))
    np.testing.assert_array_equal(ours, bits(expected(raw, name)))
    np.testing.assert_array_equal(ours, bits(libgguf.dequantize_rows(raw, GGMLQuantizationType[name])))
    np.testing.assert_array_equal(ours, bits(ggmls(raw, name, ggml_base)))


@pytest.mark.parametrize("name", STORED)
def test_odd_scales_equal_gguf_libgguf_and_ggml(name: str, ggml_base: ctypes.CDLL) -> None:
    """Subnormal, infinite and NaN scales, in each f16 field and in all of them."""
    layout = FORMATS[name]
    for fields in [(field,) for field in F16_FIELDS[name]] + [F16_FIELDS[name]]:
        raw = random_rows(name, len(ODD_SCALES), 256)
        blocks = raw.reshape(len(ODD_SCALES), -1, layout.block_bytes)
        for field in fields:
            blocks[..., field : field + 2] = ODD_SCALES.view(np.uint8).reshape(-1, 1, 2)
        theirs, ours = expected(raw, name), dequantize(raw, name)
        np.testing.assert_array_equal(bits(ours), bits(theirs))
        np.testing.assert_array_equal(
            bits(ours), bits(libgguf.dequantize_rows(raw, GGMLQuantizationType[name]))
        )
        np.testing.assert_array_equal(bits(ours), bits(ggmls(raw, name, ggml_base)))


@pytest.mark.parametrize("name", STORED)
def test_zero_blocks_equal_gguf_libgguf_and_ggml(name: str, ggml_base: ctypes.CDLL) -> None:
    raw = np.zeros_like(random_rows(name, 3, 512))
    ours = bits(dequantize(raw, name))
    np.testing.assert_array_equal(ours, bits(expected(raw, name)))
    np.testing.assert_array_equal(ours, bits(libgguf.dequantize_rows(raw, GGMLQuantizationType[name])))
    np.testing.assert_array_equal(ours, bits(ggmls(raw, name, ggml_base)))


@settings(max_examples=100, deadline=None)
@given(data=st.data(), name=st.sampled_from(STORED))
def test_any_block_equals_ggml(data: st.DataObject, name: str, ggml_base: ctypes.CDLL) -> None:
    size = FORMATS[name].block_bytes
    block = data.draw(st.binary(min_size=size, max_size=size))
    raw = np.frombuffer(block * 2, np.uint8).reshape(2, size)
    np.testing.assert_array_equal(bits(dequantize(raw, name)), bits(ggmls(raw, name, ggml_base)))


def test_every_e8m0_exponent_of_mxfp4() -> None:
    raw = random_rows("MXFP4", 256, 32)
    raw[:, 0] = np.arange(256)
    np.testing.assert_array_equal(bits(dequantize(raw, "MXFP4")), bits(expected(raw, "MXFP4")))


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_every_16_bit_float(name: str, ggml_base: ctypes.CDLL) -> None:
    """NaNs keep their payload and stay signalling where they are, as in the gguf package.

    ggml's C code gives the same but for signalling NaNs of F16, which the processor's conversion makes
    quiet where the library was built to use it.
    """
    raw = np.arange(65536, dtype="<u2").view(np.uint8).reshape(8, -1)
    ours, theirs = bits(dequantize(raw, name, threads=2)), bits(ggmls(raw, name, ggml_base))
    np.testing.assert_array_equal(ours, bits(expected(raw, name)))
    exponent, fraction = ours & 0x7F800000, ours & 0x007FFFFF
    signalling = (exponent == 0x7F800000) & (fraction != 0) & (fraction < 0x00400000)
    np.testing.assert_array_equal(ours[~signalling], theirs[~signalling])
    np.testing.assert_array_equal(ours[signalling] | 0x00400000, theirs[signalling] | 0x00400000)


@pytest.mark.parametrize("name", ["F16", "BF16"])
@pytest.mark.parametrize("n_columns", [1, 7, 8, 13, 24])
def test_16_bit_floats_of_any_width(name: str, n_columns: int) -> None:
    raw = random_rows(name, 5, n_columns)
    np.testing.assert_array_equal(bits(dequantize(raw, name)), bits(expected(raw, name)))


@pytest.mark.slow
def test_a_plain_processor_gives_the_same_bits() -> None:
    rows = {name: random_rows(name, 3, 512) for name in [*BLOCKS, "F16", "BF16"]}
    theirs = on_generic_cpu(
        "driftscope.kernels.dequantize:dequantize", {n: (raw, n) for n, raw in rows.items()}
    )
    for name, raw in rows.items():
        np.testing.assert_array_equal(bits(dequantize(raw, name)), bits(theirs[name]))


@pytest.mark.parametrize("name", BLOCKS)
def test_equals_reference(name: str) -> None:
    raw = random_rows(name, 5, 768, seed=3)
    np.testing.assert_array_equal(dequantize(raw, name), reference.dequantize(raw, name))


def test_q8_k_equals_ggml(ggml_base) -> None:
    raw = random_rows("Q8_K", 4, 1024)
    raw.reshape(-1, 292)[:, :4] = np.float32([0.013]).view(np.uint8)
    theirs = np.empty(4 * 1024, np.float32)
    pointer = ctypes.c_void_p
    ggml_base.dequantize_row_q8_K(pointer(raw.ctypes.data), pointer(theirs.ctypes.data), ctypes.c_int64(4096))
    np.testing.assert_array_equal(bits(dequantize(raw, "Q8_K")).reshape(-1), bits(theirs))


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_go_through_gguf(name: str) -> None:
    raw = random_rows(name, 2, 512)
    np.testing.assert_array_equal(bits(dequantize(raw, name)), bits(expected(raw, name)))


def test_floats() -> None:
    values = np.array([[0.0, -0.0, 1.5, -3e-41, 65504.0, 1e30, np.inf, -np.inf]], np.float32)
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    np.testing.assert_array_equal(bits(dequantize(values.view(np.uint8), "F32")), bits(values))
    np.testing.assert_array_equal(dequantize(half.view(np.uint8), "F16"), half.astype(np.float32))
    brain = (values.view(np.uint32) >> 16).astype(np.uint16)
    np.testing.assert_array_equal(
        bits(dequantize(brain.view(np.uint8), "BF16")), brain.astype(np.uint32) << 16
    )
    double = np.array([[1e300, 1 / 3]])
    np.testing.assert_array_equal(dequantize(double.view(np.uint8), "F64"), np.float32([[np.inf, 1 / 3]]))


def test_unaligned_and_read_only_bytes() -> None:
    values = np.arange(8, dtype=np.float32)
    stored = np.zeros(33, np.uint8)
    stored[1:] = values.view(np.uint8)
    stored.flags.writeable = False
    out = dequantize(stored[1:].reshape(2, 16), "F32")
    assert out.flags.aligned
    np.testing.assert_array_equal(out, values.reshape(2, 4))
    raw = random_rows("Q5_0", 4, 64)
    raw.flags.writeable = False
    np.testing.assert_array_equal(dequantize(raw, "Q5_0"), expected(raw, "Q5_0"))


@pytest.mark.parametrize("name", ["Q4_K", "Q5_0"])
def test_bits_do_not_depend_on_threads(name: str) -> None:
    raw = random_rows(name, 301, 2048)
    np.testing.assert_array_equal(bits(dequantize(raw, name, threads=3)), bits(dequantize(raw, name)))


def test_no_rows() -> None:
    assert dequantize(np.empty((0, 144), np.uint8), "Q4_K").shape == (0, 256)


@pytest.mark.model
def test_real_weights_equal_gguf_libgguf_and_ggml(default_gguf: Path, ggml_base: ctypes.CDLL) -> None:
    seen = set()
    for tensor in GGUFReader(default_gguf).tensors:
        name = tensor.tensor_type.name
        if name not in BLOCKS:
            continue
        seen.add(name)
        raw = np.ascontiguousarray(tensor.data.reshape(-1, tensor.data.shape[-1])[:512])
        ours = bits(dequantize(raw, name))
        np.testing.assert_array_equal(ours, bits(expected(raw, name)))
        np.testing.assert_array_equal(ours, bits(libgguf.dequantize_rows(raw, tensor.tensor_type)))
        np.testing.assert_array_equal(ours, bits(ggmls(raw, name, ggml_base)))
    assert seen


def test_bad_input_is_an_input_error() -> None:
    with pytest.raises(InputError, match="Q9_9"):
        dequantize(np.zeros((1, 4), np.uint8), "Q9_9")
    with pytest.raises(InputError, match="multiple of 144 bytes"):
        dequantize(np.zeros((1, 145), np.uint8), "Q4_K")
