from __future__ import annotations

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from driftscope.artifacts.ggml_types import GGML_TYPES
from driftscope.errors import InputError
from driftscope.kernels.dequantize import dequantize
from driftscope.kernels.formats import FORMATS, UNDECODED, format_of, row_bytes, row_columns


@pytest.mark.parametrize("name", [name for name, layout in FORMATS.items() if layout.ggml_type >= 0])
def test_sizes_and_numbers_are_ggmls(name: str) -> None:
    layout = format_of(name)
    assert layout.ggml_type == GGMLQuantizationType[name].value
    assert (layout.block_size, layout.block_bytes) == GGML_QUANT_SIZES[GGMLQuantizationType[name]]


def test_activation_formats_are_ggmls(ggml_cpu) -> None:
    """`vec_dot_type` of ggml's CPU backend, for every type that has a dot product."""
    import ctypes

    class Traits(ctypes.Structure):
        _fields_ = [
            ("from_float", ctypes.c_void_p),
            ("vec_dot", ctypes.c_void_p),
            ("vec_dot_type", ctypes.c_int),
            ("nrows", ctypes.c_int64),
        ]

    ggml_cpu.ggml_get_type_traits_cpu.restype = ctypes.POINTER(Traits)
    named = {0: "none", 1: "f16", 30: "bf16", 8: "q8_0", 9: "q8_1", 15: "q8_K"}
    for layout in FORMATS.values():
        if layout.ggml_type < 0:
            continue
        traits = ggml_cpu.ggml_get_type_traits_cpu(layout.ggml_type).contents
        if layout.native and traits.vec_dot:
            assert layout.activation == named[traits.vec_dot_type], layout.name


def test_row_sizes() -> None:
    assert row_bytes("Q4_K", 1536) == 864
    assert row_columns("Q4_K", 864) == 1536
    with pytest.raises(InputError, match="multiple of 256 values"):
        row_bytes("Q4_K", 576)
    with pytest.raises(InputError, match="multiple of 18 bytes"):
        row_columns("Q4_0", 17)
    with pytest.raises(InputError, match="not known"):
        format_of("Q4_Z")


@pytest.mark.parametrize("kind", list(GGMLQuantizationType))
def test_every_type_of_the_gguf_package_is_decoded_or_refused_by_name(kind: GGMLQuantizationType) -> None:
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    assert GGML_TYPES[int(kind)][:2] == (kind.name, block_size)
    # Random bytes below 0x70 keep every scale finite, whatever its width and place.
    raw = np.random.Generator(np.random.Philox(int(kind))).integers(
        0, 0x70, (3, 2 * block_bytes), dtype=np.uint8
    )
    try:
        expected = quants.dequantize(raw, kind)
    except NotImplementedError:
        expected = None
    if expected is not None:
        assert np.array_equal(dequantize(raw, kind.name), expected.astype(np.float32).reshape(3, -1))
    elif kind.name not in ("F64", "Q8_K"):
        assert kind.name in UNDECODED
        with pytest.raises(InputError, match=f"{kind.name} cannot be read as weights"):
            format_of(kind.name)


def test_every_type_of_a_file_is_decoded_or_refused_by_name() -> None:
    assert {kind.name for kind in GGML_TYPES.values()} <= {*FORMATS, *UNDECODED}
    for kind in GGML_TYPES.values():
        if kind.name in FORMATS:
            assert (FORMATS[kind.name].block_size, FORMATS[kind.name].block_bytes) == kind[1:]
