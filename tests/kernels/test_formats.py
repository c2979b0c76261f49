from __future__ import annotations

import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from driftscope.errors import InputError
from driftscope.kernels.formats import FORMATS, format_of, row_bytes, row_columns


@pytest.mark.parametrize("name", list(FORMATS))
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
