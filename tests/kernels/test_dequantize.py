from __future__ import annotations

from pathlib import Path

import libgguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, quants

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
    ],
    "<u2",
)


def random_rows(name: str, n_rows: int, n_columns: int, seed: int = 0) -> np.ndarray:
    layout = FORMATS[name]
    size = (n_rows, n_columns // layout.block_size * layout.block_bytes)
    return np.random.Generator(np.random.Philox(seed)).integers(0, 256, size, dtype=np.uint8)


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint32)


def expected(raw: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return quants.dequantize(raw, GGMLQuantizationType[name])


@pytest.mark.parametrize("name", STORED)
def test_random_bytes_equal_gguf_and_libgguf(name: str) -> None:
    raw = random_rows(name, 67, 1536)
    ours = bits(dequantize(raw, name))
    np.testing.assert_array_equal(ours, bits(expected(raw, name)))
    np.testing.assert_array_equal(ours, bits(libgguf.dequantize_rows(raw, GGMLQuantizationType[name])))


@pytest.mark.parametrize("name", STORED)
def test_odd_scales_equal_gguf(name: str) -> None:
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


@pytest.mark.parametrize("name", STORED)
def test_zero_blocks(name: str) -> None:
    raw = np.zeros_like(random_rows(name, 3, 512))
    np.testing.assert_array_equal(bits(dequantize(raw, name)), bits(expected(raw, name)))


def test_every_e8m0_exponent_of_mxfp4() -> None:
    raw = random_rows("MXFP4", 256, 32)
    raw[:, 0] = np.arange(256)
    np.testing.assert_array_equal(bits(dequantize(raw, "MXFP4")), bits(expected(raw, "MXFP4")))


@pytest.mark.parametrize("name", BLOCKS)
def test_equals_reference(name: str) -> None:
    raw = random_rows(name, 5, 768, seed=3)
    np.testing.assert_array_equal(dequantize(raw, name), reference.dequantize(raw, name))


def test_q8_k_equals_ggml(ggml_base) -> None:
    import ctypes

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
def test_real_weights_equal_gguf(default_gguf: Path) -> None:
    for tensor in GGUFReader(default_gguf).tensors:
        if tensor.tensor_type.name in BLOCKS:
            raw = tensor.data.reshape(-1, tensor.data.shape[-1])[:2048]
            name = tensor.tensor_type.name
            np.testing.assert_array_equal(bits(dequantize(raw, name)), bits(expected(raw, name)))


def test_bad_input_is_an_input_error() -> None:
    with pytest.raises(InputError, match="Q9_9"):
        dequantize(np.zeros((1, 4), np.uint8), "Q9_9")
    with pytest.raises(InputError, match="multiple of 144 bytes"):
        dequantize(np.zeros((1, 145), np.uint8), "Q4_K")
